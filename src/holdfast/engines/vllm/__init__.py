"""vLLM as an engine of Holdfast: `engine.VllmEngine`. Importing this loads nothing of vLLM."""
