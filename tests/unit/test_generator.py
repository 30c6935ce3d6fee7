"""Sample data: repeatable, complete in itself, and truthful about what it wrote and which of its lines are bad."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devstack.generator import FAULTS, SHARES, SampleSet, bad_lines, expected_store, generate
from workers.fetch.ndjson import Block
from workers.ingest.lines import LineReader, LineRules


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    return generate(tmp_path_factory.mktemp("samples"), 2100, lines_per_file=300, gzip_every=2)


def read(samples: SampleSet) -> list[tuple[str, dict[str, Any]]]:
    """Each line's resource with the type of its file."""
    return [
        (file.type, json.loads(line))
        for file in samples.files
        for line in (samples.directory / file.name).read_text().splitlines()
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if "reference" in value:
            yield value["reference"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def refused_lines(path: Path) -> set[int]:
    """The lines that ingest refuses when the manifest declares them as Patients."""
    rules = LineRules(1, 1, 0, "Patient", None, False, batch_lines=7, batch_bytes=1 << 20, max_line_bytes=1 << 24)
    batches = list(LineReader(rules).batches([Block(path.read_bytes(), 0, 1)], 0, 1))
    assert sum(batch.skipped for batch in batches) == 0
    return {issue.line for batch in batches for issue in batch.issues}


def test_the_same_seed_makes_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from devstack.generator import bad_lines, generate\n"
        "generate(Path(sys.argv[1]), 300, seed=7, gzip_every=3)\n"
        "bad_lines(Path(sys.argv[1]), 'bad.ndjson', good=20, seed=7)"
    )
    made = []
    for hash_seed in ("1", "2"):
        directory = tmp_path / hash_seed
        directory.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, directory], env=environment, check=True)
        made.append(contents(directory))
    assert len(made[0]) > len(SHARES)
    assert made[0] == made[1]


def test_another_seed_makes_other_ids(tmp_path: Path) -> None:
    ids = []
    for seed in (1, 2):
        samples = generate(tmp_path, 300, seed=seed)
        ids.append(
            {resource_id for _, resource_id, _ in expected_store(tmp_path, [file.name for file in samples.files])}
        )
    assert len(ids[0]) == len(ids[1]) == 300
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("resources", [*range(1, 25), 99, 1000, 1234])
def test_every_line_asked_for_is_there_and_every_reference_resolves(tmp_path: Path, resources: int) -> None:
    found = read(generate(tmp_path, resources))
    assert len(found) == resources
    names = {f"{kind}/{resource['id']}" for kind, resource in found}
    assert len(names) == resources
    assert {reference for _, resource in found for reference in references(resource)} <= names


def test_resources_of_one_visit_agree_on_the_patient(samples: SampleSet) -> None:
    found = read(samples)
    patients = {f"Encounter/{item['id']}": item["subject"] for kind, item in found if kind == "Encounter"}
    from_visits = [item for _, item in found if "encounter" in item]
    assert len(from_visits) > 1000
    for item in from_visits:
        assert item.get("subject", item.get("patient")) == patients[item["encounter"]["reference"]]


def test_reports_have_the_laboratory_results_of_their_own_visit(samples: SampleSet) -> None:
    found = read(samples)
    observations = {f"Observation/{item['id']}": item for kind, item in found if kind == "Observation"}
    reports = [item for kind, item in found if kind == "DiagnosticReport"]
    assert len(reports) > 100
    for report in reports:
        results = [observations[result["reference"]] for result in report["result"]]
        assert {result["encounter"]["reference"] for result in results} == {report["encounter"]["reference"]}
        assert {result["category"][0]["coding"][0]["code"] for result in results} == {"laboratory"}


def test_lines_look_like_resources_of_their_files_type(samples: SampleSet) -> None:
    found = read(samples)
    uuid = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}")
    for kind, resource in found:
        assert resource["resourceType"] == kind
        assert uuid.fullmatch(resource["id"])
        assert resource["meta"]["profile"]
        assert kind != "Patient" or not resource["text"]["div"].isascii()
    kinds = [kind for kind, _ in found]
    assert set(kinds) == set(SHARES)
    assert 0.45 < kinds.count("Observation") / len(kinds) < 0.55


def test_lines_are_as_long_as_those_of_a_real_export(samples: SampleSet) -> None:
    lengths = [len(body) for _, _, body in expected_store(samples.directory, [file.name for file in samples.files])]
    assert 900 < sum(lengths) / len(lengths) < 1500
    assert max(lengths) > 2048


def test_no_element_is_empty_and_no_placeholder_is_left(samples: SampleSet) -> None:
    for file in samples.files:
        text = (samples.directory / file.name).read_text()
        assert not re.search(r'""|\[\]|\{\}|%\(|<[^<>]*\|', text), file.name


def test_the_manifest_lists_the_files_with_their_counts(samples: SampleSet) -> None:
    manifest = json.loads((samples.directory / "manifest.json").read_text())
    listed = [(entry["type"], entry["url"], entry["count"]) for entry in manifest["output"]]
    assert listed == [(file.type, file.name, file.lines) for file in samples.files]
    assert {name for _, name, _ in listed} == {path.name for path in samples.directory.glob("*.ndjson")}
    assert "Observation-3.ndjson" in {name for _, name, _ in listed}
    assert manifest["requiresAccessToken"] is False
    assert (manifest["error"], manifest["deleted"]) == ([], [])
    assert manifest.keys() >= {"transactionTime", "request"}


def test_files_are_described_as_they_are(samples: SampleSet) -> None:
    for file in samples.files:
        data = (samples.directory / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.lines == data.count(b"\n") == len(data.splitlines()) <= 300
        assert data.endswith(b"\n")


def test_every_second_file_has_a_compressed_copy(samples: SampleSet) -> None:
    packed = [f"{file.name}.gz" for file in samples.files[1::2]]
    assert sorted(packed) == sorted(path.name for path in samples.directory.glob("*.gz"))
    for name in packed:
        path = samples.directory / name
        assert gzip.decompress(path.read_bytes()) == path.with_suffix("").read_bytes()
        assert path.read_bytes()[4:8] == bytes(4), "the time of compression is in the header"


def test_the_expected_store_has_each_line_as_it_is(samples: SampleSet) -> None:
    names = [file.name for file in samples.files[:3]]
    lines = [line for name in names for line in (samples.directory / name).read_bytes().split(b"\n")[:-1]]
    expected = list(expected_store(samples.directory, names))
    assert [body for _, _, body in expected] == lines
    assert [(kind, resource_id) for kind, resource_id, _ in expected] == [
        (resource["resourceType"], resource["id"]) for resource in map(json.loads, lines)
    ]


@pytest.mark.parametrize("resources", [0, -1])
def test_fewer_than_one_resource_is_refused(tmp_path: Path, resources: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        generate(tmp_path, resources)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("good", "seed"), [(0, 1), (93, 2), (500, 3)])
def test_exactly_the_lines_named_bad_are_refused(tmp_path: Path, good: int, seed: int) -> None:
    bad = bad_lines(tmp_path, "bad.ndjson", good=good, seed=seed)
    lines = (tmp_path / "bad.ndjson").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == good + len(bad)
    assert all(line.strip() for line in lines)
    assert set(bad.values()) == set(FAULTS)
    assert refused_lines(tmp_path / "bad.ndjson") == set(bad)


def test_bad_lines_are_refused_for_the_fault_they_were_given(tmp_path: Path) -> None:
    bad = bad_lines(tmp_path, "bad.ndjson", good=10, seed=4)
    rules = LineRules(1, 1, 0, "Patient", None, False, batch_lines=1000, batch_bytes=1 << 20, max_line_bytes=1 << 24)
    [batch] = LineReader(rules).batches([Block((tmp_path / "bad.ndjson").read_bytes(), 0, 1)], 0, 1)
    said = {bad[issue.line]: issue.diagnostics for issue in batch.issues}
    words = ("not UTF-8", "nested too deeply", "resourceType is missing", "malformed JSON", "NUL")
    told = ("not UTF-8", "nested too deeply", "resourceType is missing", "malformed JSON", "U+0000")
    for word, expected in zip(words, told, strict=True):
        matching = [text for fault, text in said.items() if fault.startswith(word)]
        assert matching, word
        assert all(expected in text for text in matching), matching
    assert "not an object" in said["an array, not an object"]
    assert "declares this file as Patient" in said["resourceType is not the declared one"]
    assert "id must be" in said["id is longer than 64 characters"]


def test_good_lines_among_bad_ones_have_ids_that_no_sample_has(tmp_path: Path) -> None:
    samples = generate(tmp_path, 400, seed=5)
    bad = bad_lines(tmp_path, "bad.ndjson", good=20, seed=5)
    lines = (tmp_path / "bad.ndjson").read_bytes().splitlines()
    good = {json.loads(line)["id"] for number, line in enumerate(lines, 1) if number not in bad}
    served = {resource_id for _, resource_id, _ in expected_store(tmp_path, [file.name for file in samples.files])}
    assert len(good) == 20
    assert not good & served
