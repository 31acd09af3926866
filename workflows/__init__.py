"""Example workflows, the tool that makes them (``build``) and one that runs them (``run``)."""
