"""Files that several processes write at once."""

import concurrent.futures

from alexnet_jax.files import write_atomically, write_together


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    contents = [bytes([n]) * 20_000 for n in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: write_atomically(tmp_path / "test.json", data), contents * 3))
    assert (tmp_path / "test.json").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["test.json"]


def test_what_belongs_together_stays_together(tmp_path):
    """Two evaluations: the results of one beside the predictions of the other would be a wrong number."""

    def write(n: int) -> None:
        write_together(tmp_path, {"predictions.npz": bytes([n]) * 50_000, "test.json": bytes([n])})

    (tmp_path / ".test.json.0123.tmp").write_text("left by a process that was killed")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert (tmp_path / "predictions.npz").read_bytes() == (tmp_path / "test.json").read_bytes() * 50_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "predictions.npz", "test.json"]
