"""Everything with everything: what has an effect on the core's euler has one on GM samplers, or one line says why not.

The control of every row is euler with the core's CFGGuider on the same GMFlow MODEL. A cell holds the mean change of a
pixel (0 to 255) that the patch makes, and the right words where it cannot be combined. The wrappers of other people's
packs are played by the tests' own (``wrappers/``).
"""

from dataclasses import dataclass, field

import pytest

STEPS, BATCH, CFG = 4, 2, 2.0
GUIDERS = ("core", "vanilla", "probabilistic")
SAMPLERS = ("euler", "GM-ODE", "GM-SDE")
NOTHING = 0.02  # of 255: rounding

# Why a cell may hold no number.
MIXTURE = "needs the mixture of the whole image"
SKIPPED = "a patch that skips"


@dataclass(frozen=True)
class Row:
    """One patch: its node, its inputs, on which side of the sampler it is;
    ``refused`` maps a cell (or its part) to its words."""

    node: str
    inputs: dict = field(default_factory=dict)
    side: str = "model"
    refused: dict = field(default_factory=dict)
    warned: bool = False         # it replaces CFG, so that probabilistic guidance names it and goes on without it
    batch: int = BATCH


GM = {(sampler, guider) for sampler in ("GM-ODE", "GM-SDE") for guider in GUIDERS}
MIXED = GM | {("euler", "probabilistic")}  # the cells that read mixtures

ROWS = [
    # ---- the core's ----
    Row("RescaleCFG", warned=True), Row("RenormCFG", {"cfg_trunc": 100.0}, warned=True, batch=1),
    Row("CFGZeroStar"), Row("APG", warned=True), Row("TCFG", warned=True), Row("Mahiro"),
    Row("CFGNorm", {"strength": 0.5}), Row("CFGOverride", {"cfg": 5.0, "start_percent": 0.0, "end_percent": 1.0},
                                           warned=True), Row("Epsilon Scaling", {"scaling_factor": 1.05}),
    Row("EasyCache", {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0}, batch=1,
        refused=dict.fromkeys(MIXED, "EasyCache")),
    Row("LazyCache", {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0},
        refused=dict.fromkeys(GM, "LazyCache")),
    # over rows: over a batch 0.3.64's fail, whatever the model
    Row("ContextWindowsManual", {"context_length": 8, "context_overlap": 2, "dim": 2, "causal_window_fix": False},
        batch=1, refused=dict.fromkeys(MIXED, MIXTURE)),
    # ---- other people's ----
    Row("TestOtherSigma", side="sampler"), Row("TestOtherAnswer", side="sampler"), Row("TestWritesToX", side="sampler"),
    Row("TestAsksAgain"), Row("TestMomentum"), Row("TestScale"), Row("TestReplacesCFG", {"strength": 1.5}, warned=True),
    Row("TestOtherNetwork"), Row("TestTiles", refused=dict.fromkeys(MIXED, MIXTURE)), Row("TestAttention"),
]


def sampling(g, sampler: str, guider: str, row: Row | None, seed: int = 3):
    """One cell's sampling; without a row the plain one."""
    known = g.graph.info[row.node]["input"] if row else {}
    given = {key: row.inputs[key] for kind in known.values() for key in kind if key in row.inputs}
    model = g.add(row.node, model=g.model, **given) if row and row.side == "model" else g.model
    made = {"euler": ("KSamplerSelect", {"sampler_name": "euler"}), "GM-ODE": ("SamplerGMFlowODE", {}),
            "GM-SDE": ("SamplerGMFlowSDE", {})}
    node, inputs = made[sampler]
    made_sampler = g.add(node, **inputs)
    if row and row.side == "sampler":
        made_sampler = g.add(row.node, sampler=made_sampler, **given)
    if guider == "core":
        link = g.add("CFGGuider", model=model, positive=g.positive, negative=g.negative, cfg=CFG)
    else:
        method = "vanilla CFG" if guider == "vanilla" else guider
        link = g.add("GMFlowGuider", model=model, positive=g.positive, method=method, cfg_scale=CFG, guidance=0.3)
    return g.custom(made_sampler, link, steps=STEPS, seed=seed, node="SamplerCustomAdvanced")


@pytest.fixture(scope="module")
def plain(host):
    """The samplings without a patch, by batch and cell: computed once."""
    from conftest import Digits

    found: dict = {}

    def images(batch: int) -> dict:
        if batch not in found:
            g = Digits(host, batch=batch, labels="6")
            cells = [(sampler, guider) for sampler in SAMPLERS for guider in GUIDERS]
            found[batch] = dict(zip(cells, g.latents(*(sampling(g, *cell, None) for cell in cells)), strict=True))
        return found[batch]

    return images


def effects(host, digits, plain, row: Row) -> dict:
    """The changes of a row's cells, and the words of those that are refused."""
    cells = [(sampler, guider) for sampler in SAMPLERS for guider in GUIDERS]
    g = digits(batch=row.batch, labels="6")
    taken = [cell for cell in cells if cell not in row.refused]
    latents = g.latents(*(sampling(g, *cell, row) for cell in taken), g.empty)[:-1]
    found = {}
    for cell, latent in zip(taken, latents, strict=True):
        assert latent.isfinite().all() and latent.abs().max() < 8, (row.node, cell)
        found[cell] = 127.5 * (latent - plain(row.batch)[cell]).abs().mean().item()
    for cell in row.refused:
        g = digits(batch=row.batch, labels="6")
        host.save(g.graph, sampling(g, *cell, row))
        found[cell] = host.refused(g.graph)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.node)
def test_effects(host, digits, plain, row):
    if row.node not in host.info:
        pytest.skip(f"{row.node} is not in ComfyUI {host.version}")
    before = len(host.log())
    found = effects(host, digits, plain, row)
    shown = {f"{sampler}, {guider}": value if isinstance(value, str) else round(value, 2)
             for (sampler, guider), value in found.items()}
    print(f"EFFECT {host.version} {row.node}: {shown}")
    euler = found["euler", "core"]
    for cell, value in found.items():
        sampler, guider = cell
        if cell in row.refused:
            assert row.refused[cell] in value and len(value) < 600, value
        elif guider == "probabilistic" and row.warned:
            assert value < NOTHING
        else:
            assert (value > NOTHING) == (euler > NOTHING), (cell, shown)
            if guider == "core" or (guider == "vanilla" and sampler != "euler"):
                assert euler / 10 <= value + NOTHING and value <= 10 * euler + NOTHING, (cell, shown)
    assert found["euler", "vanilla"] == pytest.approx(euler, abs=0.01), "the method vanilla CFG is the core's own"
    warnings = [line for line in host.log()[before:].splitlines() if "does nothing with probabilistic guidance" in line]
    assert bool(warnings) == row.warned, warnings
