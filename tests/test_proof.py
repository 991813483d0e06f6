"""Before a job: what it would give. After it: proof that the sources can go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import fill, png
from without_ray import without_ray

import vaestream
from vaestream.archive.reader import Archive
from vaestream.archive.rows import read_rows
from vaestream.archive.storage import open_store
from vaestream.archive.writer import write_part
from vaestream.cli import main
from vaestream.errors import VaestreamError
from vaestream.pipeline.compressor import Settings
from vaestream.pipeline.destination import Destination
from vaestream.pipeline.estimate import estimate
from vaestream.pipeline.prepare import Prepared, prepare
from vaestream.pipeline.proof import Proof, prove

NAMES = [*(f"{i}.png" for i in range(6)), "sub/x.png"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("proof") / "source", NAMES)
    (folder / "notes.txt").write_bytes(b"not a photo")
    (folder / "broken.png").write_bytes(png(3)[:900])
    return folder


@pytest.fixture(scope="module")
def archive(source: Path, weights: Path) -> Path:
    with without_ray():
        vaestream.compress(source, source.parent / "archive", weights=weights, min_psnr=0.0)
    return source.parent / "archive"


def proof(archive: Path, source: Path, **options: Any) -> Proof:
    return prove(vaestream.open(str(archive)), [str(source)], **options)


def test_an_archive_is_proved_against_its_sources(source: Path, archive: Path) -> None:
    found = proof(archive, source)
    assert (found.objects, found.photos, found.verbatim) == (9, 7, 2)
    assert (found.problems, found.unlisted) == ([], 0)
    assert proof(archive, source, include=["*.txt"]).unlisted == 8


def test_whatever_is_not_in_the_archive_is_named(
    source: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = fill(tmp_path / "source", [*NAMES, "new.png"])
    (grown / "notes.txt").write_bytes(b"another text")
    (grown / "0.png").write_bytes(png(55))
    found = proof(archive, grown)
    assert {key for key, _ in found.problems} == {"new.png", "notes.txt", "0.png"}
    assert dict(found.problems)["new.png"] == "is not in the archive"
    assert "not what the row was made from" in dict(found.problems)["0.png"]
    assert found.unlisted == 1
    assert main(["verify", str(archive), "--against", str(grown)]) == 1
    assert "new.png: is not in the archive" in capsys.readouterr().out
    assert main(["verify", str(archive), "--against", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["photos"] == 7


def _with_other_rows(archive: Path, change: Callable[[Any], Any]) -> Archive:
    """The archive with its rows changed by `change`, whole in every other way."""
    fs, root = open_store(str(archive), None)
    place = Destination.open(fs, root, settings={}, model_id="", overwrite=True)
    assert place.manifest is not None
    place.settings, place.model_id = place.manifest.settings, str(place.manifest.model_id)
    parts = [
        write_part(
            fs,
            root,
            part.part_id[::-1],
            [change(row) for row in read_rows(fs, f"{root}/{part.name}")],
        )
        for part in place.manifest.parts
    ]
    place.commit(parts)
    return vaestream.open(str(archive))


def test_a_row_that_claims_too_much_is_named(source: Path, archive: Path, tmp_path: Path) -> None:
    from dataclasses import replace
    from shutil import copytree

    copy = copytree(archive, tmp_path / "copy")

    def boast(row: Any) -> Any:
        if row.key == "1.png":
            return replace(row, psnr=row.psnr + 1)
        return replace(row, exif=b"Exif\0\0other") if row.key == "2.png" else row

    opened = _with_other_rows(copy, boast)
    problems = dict(prove(opened, [str(source)]).problems)
    assert sorted(problems) == ["1.png", "2.png"]
    assert "its row claims" in problems["1.png"] and "EXIF" in problems["2.png"]


def _prepared(source: Path, destination: Path, weights: Path) -> Prepared:
    settings = Settings.of(min_psnr=0.0)
    return prepare(source, destination, settings=settings, weights=weights)


def test_a_dry_run_tells_what_the_job_then_gives_and_writes_nothing(
    source: Path, archive: Path, weights: Path, tmp_path: Path
) -> None:
    told = estimate(_prepared(source, tmp_path / "dry", weights), sample=100)
    assert not (tmp_path / "dry").exists()
    totals = vaestream.open(str(archive)).manifest.totals
    assert (told.objects, told.sampled, told.photos) == (9, 9, totals.photos_vae)
    assert (told.kept, told.errors) == (totals.reasons, totals.errors)
    assert (
        told.source_bytes
        == totals.source_bytes
        == sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    )
    assert told.archive_bytes == totals.coded_bytes
    assert told.psnr == pytest.approx(totals.psnr_sum / totals.psnr_count)
    few = estimate(_prepared(source, tmp_path / "dry", weights), sample=3)
    assert (few.objects, few.sampled, few.source_bytes) == (9, 3, told.source_bytes)
    rest = estimate(_prepared(source, archive, weights))
    assert (rest.objects, rest.sampled, rest.ratio) == (0, 0, None)
    with pytest.raises(VaestreamError, match="at least 1 object"):
        estimate(_prepared(source, tmp_path / "dry", weights), sample=0)


def test_a_dry_run_of_a_table_learns_sizes_from_its_sample(tmp_path: Path, weights: Path) -> None:
    table = pa.table({"image": [png(i) for i in range(4)]})
    pq.write_table(table, tmp_path / "x.parquet")
    told = estimate(_prepared(tmp_path / "x.parquet", tmp_path / "dry", weights))
    assert (told.objects, told.sampled) == (4, 4)
    assert told.source_bytes == sum(len(png(i)) for i in range(4))


def test_the_command_line_of_a_dry_run(
    source: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", str(source), str(tmp_path / "dry"), "--weights", str(weights)]
    assert main([*command, "--dry-run", "--sample", "4"]) == 0
    assert "nothing written; 9 objects to do" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampled"] == 9
