"""The host's figures: against known allocations, fake control-group trees, and platforms without /proc."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lightning_memload.memory import available_host_bytes, host
from lightning_memload.memory.cgroup import CgroupMemory
from lightning_memload.memory.host import (
    HostMeter,
    HostSample,
    HostStatus,
    major_faults,
    read_io_bytes,
    read_status,
    reset_peak_rss,
)
from tests.fresh_process import run_fresh

MIB = 1 << 20
SLACK = 2 * MIB
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def anonymous(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.memset((ctypes.c_char * num_bytes).from_buffer(memory), 1, num_bytes)
    return memory


@linux
class TestMeter:
    def test_counts_a_known_anonymous_allocation(self) -> None:
        meter = HostMeter()
        before = meter.read()
        memory = anonymous(64 * MIB)
        after = meter.read()
        memory.close()
        freed = meter.read()
        meter.close()
        assert before.anonymous_bytes is not None
        assert after.anonymous_bytes is not None
        assert freed.anonymous_bytes is not None
        assert abs(after.anonymous_bytes - before.anonymous_bytes - 64 * MIB) < SLACK
        assert abs(freed.anonymous_bytes - before.anonymous_bytes) < SLACK
        assert after.file_backed_bytes is not None
        assert after.rss_bytes == after.anonymous_bytes + after.file_backed_bytes

    def test_agrees_with_status(self) -> None:
        meter = HostMeter()
        sample, status = meter.read(), read_status()
        meter.close()
        assert sample.anonymous_bytes is not None
        assert sample.file_backed_bytes is not None
        assert status.anonymous_bytes is not None
        assert status.file_bytes is not None
        assert status.shmem_bytes is not None
        assert abs(sample.anonymous_bytes - status.anonymous_bytes) < SLACK
        assert abs(sample.file_backed_bytes - status.file_bytes - status.shmem_bytes) < SLACK

    def test_shared_memory_is_not_anonymous(self) -> None:
        meter = HostMeter()
        before, status_before = meter.read(), read_status()
        with mmap.mmap(-1, 16 * MIB) as shared:
            shared.write(b"x" * (16 * MIB))
            after, status_after = meter.read(), read_status()
        meter.close()
        assert before.file_backed_bytes is not None
        assert after.file_backed_bytes is not None
        assert abs(after.file_backed_bytes - before.file_backed_bytes - 16 * MIB) < SLACK
        assert status_before.shmem_bytes is not None
        assert status_after.shmem_bytes is not None
        assert status_after.shmem_bytes - status_before.shmem_bytes == 16 * MIB

    def test_a_forked_child_reads_itself(self) -> None:
        # A fresh process: forking pytest, whose other tests may have threads, would be a lottery.
        code = """
import os, mmap
from lightning_memload.memory.host import HostMeter
meter = HostMeter()
ballast = b"x" * (64 << 20)
parent = meter.read().rss_bytes
read_end, write_end = os.pipe()
pid = os.fork()
if pid == 0:
    del ballast
    os.write(write_end, str(meter.read().anonymous_bytes).encode())
    os._exit(0)
os.waitpid(pid, 0)
child = int(os.read(read_end, 64))
assert child < meter.read().anonymous_bytes - (60 << 20), (child, meter.read())
"""
        run_fresh(code)

    def test_closes_its_descriptor_and_opens_again(self) -> None:
        meter = HostMeter()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            assert meter.read().rss_bytes > 0
            assert meter.read().rss_bytes > 0
            meter.close()
        meter.close()
        assert len(os.listdir("/proc/self/fd")) == before


@linux
class TestMarksAndCounters:
    def test_peak_rss_is_exact_and_resettable(self) -> None:
        anonymous(64 * MIB).close()
        assert reset_peak_rss()
        low = read_status().peak_rss_bytes
        anonymous(64 * MIB).close()
        high = read_status().peak_rss_bytes
        assert low is not None
        assert high is not None
        assert abs(high - low - 64 * MIB) < SLACK
        assert reset_peak_rss()
        again = read_status().peak_rss_bytes
        assert again is not None
        assert abs(again - low) < SLACK

    def test_page_tables_of_64_mib_in_small_pages(self) -> None:
        before = read_status().page_table_bytes
        assert before is not None
        memory = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1
        after = read_status().page_table_bytes
        memory.close()
        assert after is not None
        expected = 64 * MIB // mmap.PAGESIZE * 8
        assert abs(after - before - expected) <= 2 * mmap.PAGESIZE

    def test_read_calls_are_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"x" * MIB)
        before = read_io_bytes()
        if before is None:
            pytest.skip("/proc/self/io is not readable here")
        path.read_bytes()
        after = read_io_bytes()
        assert after is not None
        # Some kB more: reading /proc/self/io is reading as well.
        assert MIB <= after.call_bytes - before.call_bytes < MIB + 64 * 1024
        assert after.storage_bytes >= before.storage_bytes

    def test_major_faults_only_grow(self) -> None:
        first, second = major_faults(), major_faults()
        assert first is not None
        assert second is not None
        assert 0 <= first <= second


class TestWithoutProc:
    @pytest.fixture(autouse=True)
    def _no_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(host, "_PROC_SELF", str(tmp_path / "nothing"))

    def test_only_rss_is_known(self) -> None:
        meter = HostMeter()
        sample = meter.read()
        meter.close()
        assert sample == HostSample(anonymous_bytes=None, file_backed_bytes=None, rss_bytes=sample.rss_bytes)
        assert abs(sample.rss_bytes - psutil.Process().memory_info().rss) < SLACK

    def test_other_figures_are_absent(self) -> None:
        assert read_status() == HostStatus(None, None, None, None, None)
        assert reset_peak_rss() is False
        assert read_io_bytes() is None

    def test_windows_has_a_peak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        info = SimpleNamespace(rss=3 * MIB, peak_wset=5 * MIB)
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
        assert read_status() == HostStatus(peak_rss_bytes=5 * MIB)

    def test_a_kernel_without_rss_anon_is_not_trusted_with_statm(self, tmp_path: Path) -> None:
        # gVisor: a statm with shared = 0 and a status without the split.
        directory = tmp_path / "nothing"
        directory.mkdir()
        (directory / "status").write_text("Name:\tx\nVmRSS:\t  2048 kB\n")
        (directory / "statm").write_text("4096 512 0 0 0 0 0\n")
        meter = HostMeter()
        sample = meter.read()
        meter.close()
        assert sample.anonymous_bytes is None
        assert sample.file_backed_bytes is None

    def test_no_resource_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "resource", None)
        assert major_faults() is None


def write_tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v1_group(
    directory: str, *, limit: int, usage: int, peak: int = 0, file: int = 0, hierarchical: int | None = None
) -> dict[str, object]:
    # The plain counters are the group's alone and must not be used: usage counts the children.
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {file // 2}\ntotal_active_file {file - file // 2}"
    if hierarchical is not None:
        stat += f"\nhierarchical_memory_limit {hierarchical}"
    return {
        f"{directory}/memory.limit_in_bytes": limit,
        f"{directory}/memory.usage_in_bytes": usage,
        f"{directory}/memory.max_usage_in_bytes": peak,
        f"{directory}/memory.stat": stat,
    }


def v2_group(directory: str, *, limit: int | str, usage: int, peak: int = 0, file: int = 0) -> dict[str, object]:
    return {
        f"{directory}/memory.max": limit,
        f"{directory}/memory.current": usage,
        f"{directory}/memory.peak": peak,
        f"{directory}/memory.stat": f"anon 7\ninactive_file {file // 2}\nactive_file {file - file // 2}",
    }


V1_MOUNT = "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime shared:7 - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {shown} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate"
V1_NO_LIMIT = 9223372036854771712


class TestCgroup:
    def test_v2_own_limit(self, tmp_path: Path) -> None:
        files: dict[str, object] = {
            "proc/self/cgroup": "0::/u/job",
            "proc/self/mountinfo": V2_MOUNT.format(shown="/"),
        }
        files |= v2_group("sys/fs/cgroup/u/job", limit=1000, usage=700, peak=900, file=301)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.version == 2
        assert cgroup.limit_bytes() == 1000
        assert cgroup.usage_bytes() == 700
        assert cgroup.peak_bytes() == 900
        assert cgroup.reclaimable_file_bytes() == 301
        assert cgroup.available_bytes() == 1000 - 700 + 301

    def test_v2_the_tightest_ancestor_is_in_force(self, tmp_path: Path) -> None:
        files: dict[str, object] = {"proc/self/cgroup": "0::/a/b/c", "proc/self/mountinfo": V2_MOUNT.format(shown="/")}
        files |= v2_group("sys/fs/cgroup/a", limit=5000, usage=4900)
        files |= v2_group("sys/fs/cgroup/a/b", limit=2000, usage=100, peak=321)
        files |= v2_group("sys/fs/cgroup/a/b/c", limit="max", usage=50)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() == 2000
        assert cgroup.usage_bytes() == 100
        assert cgroup.peak_bytes() == 321
        # The least room is not at the tightest limit: the wider group is nearly full of other processes.
        assert cgroup.available_bytes() == 100

    def test_v2_no_limit_anywhere(self, tmp_path: Path) -> None:
        files: dict[str, object] = {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": V2_MOUNT.format(shown="/")}
        files |= v2_group("sys/fs/cgroup/a", limit="max", usage=50, peak=60)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() is None
        assert cgroup.available_bytes() is None
        assert cgroup.usage_bytes() == 50
        assert cgroup.peak_bytes() == 60

    def test_v2_over_the_limit_leaves_nothing(self, tmp_path: Path) -> None:
        files: dict[str, object] = {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": V2_MOUNT.format(shown="/")}
        files |= v2_group("sys/fs/cgroup/a", limit=100, usage=150, file=20)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.available_bytes() == 0

    def test_v1_with_nested_limits_and_the_hybrid_line(self, tmp_path: Path) -> None:
        files: dict[str, object] = {
            "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/a/b\n0::/elsewhere",
            "proc/self/mountinfo": V1_MOUNT.format(shown="/")
            + "\n"
            + V2_MOUNT.format(shown="/").replace("group ", "group/unified "),
        }
        files |= v1_group("sys/fs/cgroup/memory", limit=V1_NO_LIMIT, usage=99999)
        files |= v1_group("sys/fs/cgroup/memory/a", limit=4000, usage=3000, peak=3500, file=900)
        files |= v1_group("sys/fs/cgroup/memory/a/b", limit=V1_NO_LIMIT, usage=500, hierarchical=4000)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.version == 1
        assert cgroup.limit_bytes() == 4000
        assert cgroup.usage_bytes() == 3000
        assert cgroup.peak_bytes() == 3500
        assert cgroup.available_bytes() == 4000 - 3000 + 900

    def test_v1_limit_above_the_container_is_seen(self, tmp_path: Path) -> None:
        files: dict[str, object] = {
            "proc/self/cgroup": "3:memory:/pod/one",
            "proc/self/mountinfo": V1_MOUNT.format(shown="/pod/one"),
        }
        files |= v1_group("sys/fs/cgroup/memory", limit=V1_NO_LIMIT, usage=500, hierarchical=800)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() == 800

    @pytest.mark.parametrize(
        ("path", "shown"),
        [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/", "/"), ("/../other", "/"), ("/docker/abc", "/..")],
    )
    @pytest.mark.parametrize("version", [1, 2])
    def test_in_a_container_the_mount_point_is_the_group(
        self, tmp_path: Path, version: int, path: str, shown: str
    ) -> None:
        mount = (V1_MOUNT if version == 1 else V2_MOUNT).format(shown=shown)
        files: dict[str, object] = {
            "proc/self/cgroup": f"3:memory:{path}" if version == 1 else f"0::{path}",
            "proc/self/mountinfo": mount,
        }
        if version == 1:
            files |= v1_group("sys/fs/cgroup/memory", limit=1000, usage=400, file=100)
        else:
            files |= v2_group("sys/fs/cgroup", limit=1000, usage=400, file=100)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() == 1000
        assert cgroup.available_bytes() == 700
        assert len(cgroup.directories) == 1

    def test_a_group_below_the_one_the_container_shows(self, tmp_path: Path) -> None:
        files: dict[str, object] = {
            "proc/self/cgroup": "0::/pod/one/job",
            "proc/self/mountinfo": V2_MOUNT.format(shown="/pod/one"),
        }
        files |= v2_group("sys/fs/cgroup", limit=1000, usage=10)
        files |= v2_group("sys/fs/cgroup/job", limit=600, usage=10)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() == 600
        assert len(cgroup.directories) == 2

    def test_without_mountinfo_the_usual_places_are_tried(self, tmp_path: Path) -> None:
        files: dict[str, object] = {"proc/self/cgroup": "0::/a"}
        files |= v2_group("sys/fs/cgroup/a", limit=1000, usage=10)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() == 1000

    def test_mount_points_with_spaces(self, tmp_path: Path) -> None:
        mount = V2_MOUNT.format(shown="/").replace("/sys/fs/cgroup", "/my\\040groups")
        files: dict[str, object] = {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mount}
        files |= v2_group("my groups/a", limit=1000, usage=10)
        cgroup = CgroupMemory.of_this_process(write_tree(tmp_path, files))
        assert cgroup is not None
        assert cgroup.limit_bytes() == 1000

    def test_none_where_there_are_no_groups(self, tmp_path: Path) -> None:
        assert CgroupMemory.of_this_process(tmp_path) is None
        write_tree(tmp_path, {"proc/self/cgroup": "0::/"})
        assert CgroupMemory.of_this_process(tmp_path) is None


class TestAvailable:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2000))

    def test_the_machine_without_a_group(self, tmp_path: Path) -> None:
        assert available_host_bytes(tmp_path) == 2000

    @pytest.mark.parametrize(("limit", "expected"), [(1500, 1100), (9000, 2000), ("max", 2000)])
    def test_the_smaller_of_machine_and_group(self, tmp_path: Path, limit: int | str, expected: int) -> None:
        files: dict[str, object] = {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2_MOUNT.format(shown="/")}
        files |= v2_group("sys/fs/cgroup", limit=limit, usage=500, file=100)
        assert available_host_bytes(write_tree(tmp_path, files)) == expected

    def test_nothing_known(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def refuse() -> None:
            raise FileNotFoundError("/proc/meminfo")

        monkeypatch.setattr(psutil, "virtual_memory", refuse)
        assert available_host_bytes(tmp_path) is None
