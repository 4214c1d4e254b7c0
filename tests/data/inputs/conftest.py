"""Small inputs, well made."""

import zipfile

import pytest

from tests.data.inputs.given import HEADER, ROW, encoded


@pytest.fixture
def folder(tmp_path):
    """A folder with pairs.csv and the two pictures of its one pair."""
    path = tmp_path / "given"
    path.mkdir()
    (path / "pairs.csv").write_text(HEADER + ROW)
    (path / "u.png").write_bytes(encoded(size=(64, 80)))
    (path / "s.png").write_bytes(encoded())
    return path


@pytest.fixture
def coprov2(tmp_path):
    """Pairs 0 and 1, the second in two categories, and a test prompt of each kind."""
    path = tmp_path / "coprov2"
    path.mkdir()
    rows = ["prompt,image,category"]
    for side in "us":
        rows += [f"{side} zero,{side}_idx_0000000_0.jpg,Hate"]
        rows += [f"{side} one,{side}_idx_0000001_0.jpg,{c}" for c in ("Harrasment", "self-harm")]
    (path / "CoProv2_train.csv").write_text("\n".join(rows))
    test = ["prompt,image,category", "U ONE ,1.jpg,sexual", "two,2.jpg,Illegal Activity"]
    (path / "CoProv2_test.csv").write_text("\n".join(test))
    with zipfile.ZipFile(path / "images.zip", "w") as archive:
        for i, name in enumerate(("u_idx_0000000", "s_idx_0000000", "u_idx_0000001")):
            archive.writestr(f"images/{name}_0.jpg", encoded("jpeg", size=(64, 64 + i)))
        archive.writestr("images/s_idx_0000001_0.jpg", encoded("jpeg", size=(70, 70)))
    return path
