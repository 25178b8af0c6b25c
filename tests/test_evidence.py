"""Which GPU kernels are taken without being asked for: hgfast/runtime/evidence.py."""

from pathlib import Path

import pytest
import torch

import hgfast
from hgfast.runtime import evidence

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def test_evidence_is_a_committed_result():
    for feature in evidence.FEATURES.values():
        assert feature.evidence is None or (RESULTS / feature.evidence).is_file()


def test_without_evidence_a_feature_is_off_until_it_is_named(monkeypatch):
    monkeypatch.setitem(evidence.FEATURES, "head", evidence.Feature("a head", "gpu.json"))
    monkeypatch.delenv(evidence.UNPROVEN, raising=False)
    assert not evidence.is_enabled("stem")
    assert evidence.is_enabled("head")
    monkeypatch.setenv(evidence.UNPROVEN, "graph, stem")
    assert evidence.is_enabled("stem")
    assert not evidence.is_enabled("latency")
    monkeypatch.setenv(evidence.UNPROVEN, "stem,all")
    assert all(map(evidence.is_enabled, evidence.FEATURES))


def test_unknown_names_are_an_error(monkeypatch):
    monkeypatch.setenv(evidence.UNPROVEN, "stem,hopper")
    with pytest.raises(ValueError, match=r"HGFAST_UNPROVEN must be .* got 'hopper'"):
        evidence.is_enabled("graph")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU()).eval()
    with pytest.raises(ValueError, match="got 'hopper'"):
        hgfast.optimize(model)
    monkeypatch.setenv("HGFAST_DISABLE", "1")  # then nothing of it matters
    hgfast.optimize(model)
