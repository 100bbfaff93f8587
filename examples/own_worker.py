r"""A worker of one's own: answers by reading the prompt backwards.

python examples/own_worker.py &
holdfast frontend
curl localhost:8000/v1/completions -d '{"model": "mirror", "prompt": "one two three", "max_tokens": 10}'
"""

from holdfast.engines.simple import GeneratorEngine, generated_of, prompt_of
from holdfast.worker.entry import run


async def mirror(request, _context):
    """Yield token ids; after a migration go on behind those that exist already."""
    backwards = prompt_of(request)[::-1]
    for token in backwards[len(generated_of(request)) :]:
        yield token


if __name__ == "__main__":
    raise SystemExit(run(None, lambda: GeneratorEngine(mirror, model_name="mirror", continuation="exact")))
