from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corymb.simulations.data.examples import Examples, Source
from corymb.simulations.data.partition import by_site, dirichlet, iid, shards
from corymb.simulations.data.population import Population
from corymb.simulations.data.sources import DataSettings


def load(source: str, **settings: object) -> Source:
    return DataSettings(source=source, **settings).load()


def test_digits() -> None:
    source = load("digits")
    assert source.train.inputs.shape == (1438, 1, 8, 8)
    assert source.classes == 10
    assert np.bincount(source.test.targets).min() >= 34  # a fifth of every class


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path: Path, suffix: str) -> None:
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = np.full((count, 2, 4), 255, np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
            data = header + array.tobytes()
            (tmp_path / f"{part}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    source = load(str(tmp_path))
    assert source.train.inputs.shape == (5, 1, 2, 4)
    assert source.train.inputs.max() == 1
    assert source.test.targets.tolist() == [0, 1, 2]


def test_npz(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((50, 3)), np.arange(50) % 5
    np.savez(tmp_path / "one.npz", x=x, y=y)
    np.savez(tmp_path / "two.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    np.savez(tmp_path / "bad.npz", inputs=x)
    assert len(load(str(tmp_path / "one.npz")).test) == 10
    assert len(load(str(tmp_path / "two.npz")).test) == 4
    with pytest.raises(ValueError, match="has arrays inputs; name them"):
        load(str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "uneven.npz", x=x, y=y[:40])
    with pytest.raises(ValueError, match="50 inputs for 40 labels"):
        load(str(tmp_path / "uneven.npz"))


SITES = {
    "one": "1,2,?,0\n3,4,?,1\n5,6,7,2\n1,1,?,0\n",
    "two": "9,8,?,1\n?,6,?,1\n4,4,4,0\n7,1,?,3\n",
}


def test_one_table_per_site(tmp_path: Path) -> None:
    """The third column is mostly missing and is dropped, then the row that still has a missing cell."""
    for name, text in SITES.items():
        (tmp_path / f"processed.{name}.data").write_text(text)
    (tmp_path / "README.md").write_text("not data")
    source = load(str(tmp_path), positive_above=0, test_fraction=0.3)
    sites = [*(source.train.sites or ()), *(source.test.sites or ())]
    assert sorted(sites) == ["one"] * 4 + ["two"] * 3
    assert source.train.inputs.shape[1] == 2
    assert source.classes == 2
    parts, names = by_site(source.train.sites or ())
    assert names == ["one", "two"]
    assert sum(map(len, parts)) == len(source.train)


def test_csv_with_names(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("disease,age,height\n" + "".join(f"{i % 2},{i},{2 * i}\n" for i in range(20)))
    source = load(str(path), label="disease")
    assert source.train.inputs.shape[1] == 2
    assert source.train.sites is None
    assert abs(float(source.train.inputs.std()) - 1) < 0.2
    with pytest.raises(ValueError, match="no label column 'illness'; it has disease, age, height"):
        load(str(path), label="illness")
    for text, message in (
        ("age,label\n", "no rows below its column names"),
        ("1,2,3\n4,5\n", "the rows of"),
        ("1,0\n2,0.5\n3,1\n", "not whole numbers"),
        ("1,0\n2,-1\n3,1\n", "negative"),
        ("1,0\ninf,1\n3,1\n", "'inf' in line 2, column 1"),
        ("a;b\n1;0\n", "separate the cells by commas"),
        ("a,a,y\n1,2,0\n", "two columns 'a'"),
        ("a,site,y\n1,2,0\n", "set data.site = 'site'"),
        ("1,0\n2,1\n", "0 test examples"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(str(path))
    path.write_text("age,label\n1,2\nold,3\n")
    with pytest.raises(ValueError, match="'old' in line 3, column 'age'"):
        load(str(path))


def test_s7_the_same_pixels_in_every_container(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (20, 6, 5), np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": rng.integers(0, 256, (4, 6, 5), np.uint8),
        "y_test": np.arange(4)[:, None],  # as Keras saves labels
    }
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "folder").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    one, two = load(str(tmp_path / "a.npz"), mean=0.3), load(str(tmp_path / "folder"), mean=0.3)
    everything = slice(None)
    assert torch.equal(one.train.inputs_at(everything), two.train.inputs_at(everything))
    assert torch.equal(one.test.inputs_at(everything), two.test.inputs_at(everything))
    assert one.train.inputs.shape == (20, 1, 6, 5)
    assert float(one.train.inputs.max()) <= 1 - 0.3
    assert two.test.targets.tolist() == [0, 1, 2, 3]


def test_images_with_channels_last(tmp_path: Path) -> None:
    x = np.zeros((10, 8, 6, 3), np.uint8)
    x[:, :, :, 1] = 255
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(10) % 2)
    inputs = load(str(tmp_path / "a.npz")).train.inputs
    assert inputs.shape[1:] == (3, 8, 6)
    assert inputs[:, 1].min() == 1


def test_s8_a_table_as_excel_writes_it(tmp_path: Path) -> None:
    """With a byte-order mark, and the label in the first column."""
    path = tmp_path / "excel.csv"
    rows = "".join(f"{i % 2},{10 * (i % 2)},{i}\r\n" for i in range(20))
    path.write_text("label,a,b\r\n" + rows, encoding="utf-8-sig")
    source = load(str(path))
    assert source.train.targets.tolist() == (source.train.inputs[:, 0] > 0).long().tolist()
    assert "The label is the column 'label'." in source.notes


def test_s19_columns_are_matched_by_name_and_guesses_are_told(tmp_path: Path) -> None:
    """Columns in another order, an index as pandas writes it, and labels 1 and 7."""
    (tmp_path / "east.csv").write_text(",a,b,y\n" + "".join(f"{i},{i},100,{1 + 6 * (i % 2)}\n" for i in range(20)))
    (tmp_path / "west.csv").write_text(",b,a,y\n" + "".join(f"{i},100,{i},{1 + 6 * (i % 2)}\n" for i in range(20)))
    source = load(str(tmp_path))
    assert source.train.inputs.shape[1] == 2
    assert source.train.inputs[:, 1].abs().max() == 0  # column b is 100 everywhere
    assert source.classes == 2
    assert "Labels became class numbers: 1 -> 0, 7 -> 1." in source.notes
    assert sum("row numbers that pandas writes" in note for note in source.notes) == 2
    (tmp_path / "west.csv").write_text(",b,c,y\n1,2,3,1\n")
    with pytest.raises(ValueError, match=r"only one of west\.csv and east\.csv has the column 'a'"):
        load(str(tmp_path))


def test_a_column_with_the_site(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    path.write_text("site,a,y\n" + "".join(f"{'north' if i < 10 else 'south'},{i},{i % 2}\n" for i in range(20)))
    source = load(str(path), site="site")
    assert by_site(source.train.sites or ())[1] == ["north", "south"]
    assert source.train.inputs.shape[1] == 1


def test_s20_heart_disease_tells_what_is_dropped_and_uses_training_statistics(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cleveland", "va"):
        lines = [f"{rng.normal():.3f},{'?' if name == 'va' else 1},{'?' if i == 3 else i},{i % 3}" for i in range(30)]
        (tmp_path / f"processed.{name}.data").write_text("\n".join(lines) + "\n")
    source = load(str(tmp_path), positive_above=0)
    assert abs(float(source.train.inputs.double().mean(dim=0).abs().max())) < 1e-6
    torch.testing.assert_close(source.train.inputs.std(dim=0, correction=0), torch.ones(2))
    assert "Dropped, as over a third of the cells are missing: column 2 of the inputs." in source.notes
    assert "Dropped 2 of 60 rows with missing cells." in source.notes
    one, two = (load(str(tmp_path), positive_above=0, split_seed=seed) for seed in (1, 2))
    assert len(one.test) == len(source.test)
    assert not torch.equal(one.test.inputs, two.test.inputs)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from io import BytesIO

    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    def picture(shade: int) -> dict[str, bytes]:
        file = BytesIO()
        Image.new("RGB", (4, 6), (shade, 0, 0)).save(file, "PNG")
        return {"bytes": file.getvalue()}

    for part, count in (("train", 6), ("test", 2)):
        columns = {"image": [picture(255) for _ in range(count)], "label": list(range(count))}
        parquet.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened: list[object] = []
    original = Image.open

    def counted(file: BytesIO) -> object:
        opened.append(file)
        return original(file)

    monkeypatch.setattr(Image, "open", counted)
    for _ in range(2):  # P2: the second time from the cache
        source = load(str(tmp_path))
        assert source.train.inputs.shape == (6, 3, 6, 4)
        assert source.train.inputs[0, :, 0, 0].tolist() == [1, 0, 0]
        assert len(opened) == 8
    columns = {"image": [picture(0) for _ in range(6)], "label": list(range(6))}
    parquet.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert load(str(tmp_path)).train.inputs[0, :, 0, 0].tolist() == [0, 0, 0]  # a changed file is decoded again
    numbers = tmp_path / "numbers.parquet"
    parquet.write_table(pa.table({"a": [1.0] * 10, "b": [2.0] * 10, "target": [0, 1] * 5}), numbers)
    assert load(str(numbers)).train.inputs.shape == (8, 2)


def test_a_parquet_file_per_site(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for site, examples in (("north", 10), ("south", 20)):
        columns = {"a": [float(examples)] * examples, "target": [0, 1] * (examples // 2)}
        parquet.write_table(pa.table(columns), tmp_path / f"{site}.parquet")
    source = load(str(tmp_path))
    assert source.train.sites == ("north",) * 8 + ("south",) * 16
    assert source.train.inputs[:, 0].tolist() == [10.0] * 8 + [20.0] * 16
    assert source.test.sites == ("north",) * 2 + ("south",) * 4
    assert source.notes == ("Each file is a site. The label is the column 'target'.",)


def test_parquet_files_of_sites_are_matched_by_the_names_of_their_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"age": [1.0] * 10, "bp": [2.0] * 10, "y": [0, 1] * 5}
    parquet.write_table(pa.table(columns), tmp_path / "north.parquet")
    parquet.write_table(pa.table({name: columns[name] for name in ("y", "bp", "age")}), tmp_path / "south.parquet")
    source = load(str(tmp_path))
    assert (source.train.inputs == torch.tensor([1.0, 2.0])).all()
    parquet.write_table(pa.table({"age": [1.0], "pulse": [2.0], "y": [0]}), tmp_path / "west.parquet")
    with pytest.raises(ValueError, match="the column 'bp' is not in both"):
        load(str(tmp_path))


def test_missing_data_and_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data at 'nowhere'"):
        load("nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not supported \(found: \.txt\)"):
        load(str(tmp_path))


@given(st.integers(1, 30), st.integers(0, 1000), st.floats(0.01, 100))
def test_every_partition_uses_every_row_once_and_no_client_is_empty(clients: int, seed: int, alpha: float) -> None:
    labels = np.random.default_rng(seed).integers(0, 4, 60)
    for partition in (iid, shards, partial(dirichlet, alpha=alpha)):
        parts = partition(labels, clients, np.random.default_rng(seed))
        assert sorted(np.concatenate(parts)) == list(range(60))
        assert min(map(len, parts)) > 0
        again = partition(labels, clients, np.random.default_rng(seed))
        assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def test_a_small_alpha_gives_clients_few_classes() -> None:
    labels = np.repeat(np.arange(10), 100)
    examples = Examples(torch.zeros(1000, 1), torch.from_numpy(labels))

    def purity(alpha: float) -> float:
        parts = dirichlet(labels, 20, np.random.default_rng(0), alpha)
        return float(Population.of(examples, parts).labels(10).max(axis=1).mean())

    assert purity(0.05) > 0.7
    assert purity(100) < 0.2
