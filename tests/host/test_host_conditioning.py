"""Conditionings together: combined, in a part of the sampling, in regions."""

import pytest
import torch


@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE", "core"])
def test_combined_classes(digits, solver):
    """Their mixtures are pooled: each image becomes one of them or something between."""
    g = digits(batch=4, labels="1")
    other = g.add("GMFlowClassConditioning", model=g.model, labels="8")
    both = g.add("ConditioningCombine", conditioning_1=g.positive, conditioning_2=other)
    one, two, mixed = g.latents(*(
        g.core(positive=p, steps=4) if solver == "core" else g.gm(positive=p, solver=solver, steps=4)
        for p in (g.positive, other, both)
    ))
    assert mixed.isfinite().all() and not torch.equal(mixed, one) and not torch.equal(mixed, two)


def test_combining_a_class_with_itself_changes_nothing(digits):
    g = digits(batch=2, labels="4")
    twice = g.add("ConditioningCombine", conditioning_1=g.positive, conditioning_2=g.positive)
    a, b = g.latents(g.gm(steps=4), g.gm(steps=4, positive=twice))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_timestep_ranges(digits):
    """One class first, another later; a gap is refused."""
    g = digits(batch=2, labels="4")
    other = g.add("GMFlowClassConditioning", model=g.model, labels="9")
    early = g.add("ConditioningSetTimestepRange", conditioning=g.positive, start=0.0, end=0.5)
    late = g.add("ConditioningSetTimestepRange", conditioning=other, start=0.5, end=1.0)
    pair = g.add("ConditioningCombine", conditioning_1=early, conditioning_2=late)
    one, both, core = g.latents(g.gm(steps=5), g.gm(positive=pair, steps=5), g.core(positive=pair, steps=5))
    assert both.isfinite().all() and core.isfinite().all() and not torch.equal(one, both)
    g.host.save(g.graph, g.gm(positive=early, steps=5))
    message = g.host.refused(g.graph)
    assert "positive" in message and "range for this step" in message


@pytest.mark.parametrize("node, inputs", [
    ("ConditioningAverage", dict(conditioning_to_strength=0.5)), ("ConditioningConcat", {}),
])
def test_blends_of_classes_are_refused(digits, node, inputs):
    g = digits(batch=1, labels="4")
    other = g.add("GMFlowClassConditioning", model=g.model, labels="9")
    blended = g.add(node, conditioning_to=g.positive, conditioning_from=other, **inputs)
    for sample in (g.gm, g.core):
        g.host.save(g.graph, sample(positive=blended, steps=1))
        message = g.host.refused(g.graph)
        assert "can not be averaged or concatenated" in message and "ConditioningCombine" in message


@pytest.mark.parametrize("where", ["mask", "area"])
def test_regions_are_refused_by_gm_samplers_only(digits, where):
    g = digits(batch=1, labels="4")
    if where == "mask":
        part = g.add("ConditioningSetMask", conditioning=g.positive,
                     mask=g.add("SolidMask", value=1.0, width=16, height=16))
    else:
        part = g.add("ConditioningSetAreaPercentage", conditioning=g.positive, width=0.5, height=0.5, x=0.0, y=0.0,
                     strength=1.0)
    if where == "mask":
        assert g.latents(g.core(positive=part, steps=2)).isfinite().all()
    g.host.save(g.graph, g.gm(positive=part, steps=2))
    message = g.host.refused(g.graph)
    assert "positive" in message and "remove the area or mask" in message
