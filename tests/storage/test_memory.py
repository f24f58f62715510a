"""How much memory a process may take: by files like those of the kernel."""

from pathlib import Path

import pytest

from saeflow.storage.memory import _limits, machine_memory


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": "3000\n"}, [3000]),
        ("0::/\n", {}, []),
        (
            "12:cpu:/a\n4:memory:/a/b\n0::/\n",
            {
                "memory/a/b/memory.limit_in_bytes": "500\n",
                "memory/memory.limit_in_bytes": "9000\n",
                "a/memory.max": "1",
            },
            [500, 9000],
        ),
        ("4:memory:/not/seen/here\n", {"memory/memory.limit_in_bytes": "700\n"}, [700]),  # in a container
    ],
)
def test_limits_are_those_of_the_groups_and_of_all_above(
    tmp_path: Path, groups: str, files: dict[str, str], limits: list[int]
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text)
    assert _limits(tmp_path / "cgroup", tmp_path / "mounted") == limits
    assert _limits(tmp_path / "none", tmp_path / "mounted") == []


def test_no_process_may_take_more_than_is_installed() -> None:
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < machine_memory() <= 1024 * int(said["MemTotal"].split()[0])
