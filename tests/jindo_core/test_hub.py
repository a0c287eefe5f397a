"""What is fetched from the Hub: safetensors, and older weights only where there are none."""

from __future__ import annotations

import pytest

from jindo_core import hub


@pytest.mark.parametrize(("published", "calls"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_older_weights_only_without_safetensors(tmp_path, monkeypatch, published, calls):
    asked = []

    def snapshot(repo, *, repo_type, allow_patterns, revision):
        asked.append(allow_patterns)
        if published.endswith(".safetensors") or "pytorch_model*.bin" in allow_patterns:
            (tmp_path / published).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve_model("owner/name") == tmp_path
    assert len(asked) == calls
    assert not any("bin" in pattern for pattern in asked[0])
    assert (tmp_path / published).exists()
