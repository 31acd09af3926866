"""ComfyUI nodes for Gaussian Mixture Flow Matching (GMFlow, arXiv 2504.05304)."""

WEB_DIRECTORY = "./web"

# Without a package there is no ComfyUI around it: a test runner or a linter that looks at this folder.
if __package__:

    async def comfy_entrypoint():
        """The pack as a V3 extension. ComfyUI calls this; nothing is imported before."""
        from .nodes import GMFlowExtension

        return GMFlowExtension()
