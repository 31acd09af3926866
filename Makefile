.PHONY: test lint host demo bench pack

test:   ## all tests that need no ComfyUI and no other package
	python -m pytest

lint:   ## style and types
	ruff check
	basedpyright

host:   ## the nodes in a real ComfyUI: make host COMFYUI_PATH=/path/to/ComfyUI
	python -m pytest tests/host

demo:   ## pictures of the bundled model
	python -m gmflow_core demo --out output/demo

bench:  ## time of a solver's step, against targets
	python tests/bench/bench_solver.py

pack:   ## node.zip, as the registry gets it
	comfy --skip-prompt node validate
	comfy --skip-prompt node pack
