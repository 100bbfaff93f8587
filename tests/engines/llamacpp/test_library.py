"""The library is recognised by its default values, or refused."""

import pytest

from holdfast.base.errors import EngineFailed
from holdfast.engines.llamacpp.library import LlamaLibrary, Params, find_library, load_library
from holdfast.engines.llamacpp.weights import content_hash, cpu_identity, fingerprint, packaged_weights

pytestmark = pytest.mark.llamacpp


class Pretender(LlamaLibrary):
    """A library whose default parameters were changed at one byte."""

    change: tuple[int, int] = (0, 0)

    def _call(self, name, *arguments):
        result = super()._call(name, *arguments)
        if name == "context_default_params":
            params = Params()
            params.raw[:] = list(result.raw)
            params.raw[self.change[0]] = self.change[1]
            return params
        return result


@pytest.mark.parametrize("change", [(0, 7), (28, 0), (52, 1), (104, 2), (137, 0), (141, 1)])
def test_an_unknown_layout_is_refused_with_what_is_wrong(change):
    found = find_library()
    Pretender.change = (12, 1)
    Pretender(found)
    Pretender.change = change
    with pytest.raises(EngineFailed, match="unknown parameter layout"):
        Pretender(found)


def test_parameters_land_where_the_library_expects_them():
    library = load_library(find_library())
    params = bytes(library.context_params(unified=True, n_ctx=1024, flash_attn_type=1).raw)
    defaults = bytes(library.context_default_params().raw)
    differing = {at for at in range(144) if params[at] != defaults[at]}
    assert {0, 1, 52} <= differing | {0}
    assert int.from_bytes(params[:4], "little") == 1024
    assert load_library(find_library()) is library
    with pytest.raises(AttributeError, match="llama_nonsense"):
        library.nonsense()


def test_fingerprint_changes_with_weights_library_and_nothing_else(tmp_path):
    library, weights = find_library(), packaged_weights()
    assert fingerprint(library, "1", weights) == fingerprint(library, "1", weights)
    assert fingerprint(library, "1", weights) != fingerprint(library, "2", weights)
    changed = tmp_path / "w.gguf"
    changed.write_bytes(b"\0" * 100_000)
    before = content_hash(changed)
    changed.write_bytes(b"\0" * 99_999 + b"\1")
    assert content_hash(changed) != before
    assert cpu_identity()
