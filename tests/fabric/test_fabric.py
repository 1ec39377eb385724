"""The emulated networks themselves: they carry, spread, count, fail and vanish as their description says."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.fabric import Fabric, LeafSpine, MultiPlane

ROOT = Path(__file__).resolve().parents[2]
Up = Callable[[Fabric], Fabric]
# Rank 0 listens; each other rank sends it bytes over connections of its own, and hears back when they are all there.
SEND = """
import os, socket, sys, time
rank, nbytes, flows, first = int(os.environ["RANK"]), *map(int, sys.argv[1:4])
target = sys.argv[4] if len(sys.argv) > 4 else os.environ["MASTER_ADDR"]
if rank == 0:
    server = socket.create_server((target, 9000))
    server.settimeout(30)
    for _ in range(flows * (int(os.environ["WORLD_SIZE"]) - 1)):
        peer, _ = server.accept()
        peer.settimeout(30)
        while peer.recv(1 << 16):
            pass
        peer.close()
else:
    for number in range(flows):
        end = time.monotonic() + 30
        while True:
            try:
                peer = socket.create_connection((target, 9000), 30, source_address=("", first + number if first else 0))
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.02)
        peer.sendall(bytes(nbytes))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
"""
# Datagrams from one port, which leave nothing behind that would keep it from being used again.
DATAGRAMS = """
import socket, sys
source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
source.bind(("", int(sys.argv[2])))
for _ in range(40):
    source.sendto(bytes(1400), (sys.argv[1], 9001))
"""
TRY = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), float(sys.argv[2]))
except ConnectionRefusedError:
    print("refused")
except OSError:
    print("silent")
"""


def sent(fabric: Fabric, nbytes: int, flows: int, *words: str, first: int = 0) -> dict[tuple[str, int, int], int]:
    """Bytes on each link when rank 1 sends `flows` times `nbytes` to rank 0."""
    before = fabric.counters()
    fabric.run([sys.executable, "-c", SEND, str(nbytes), str(flows), str(first), *words], hosts=[0, 1]).check()
    return {link: count - before[link] for link, count in fabric.counters().items()}


def reached(fabric: Fabric, source: int, address: str, timeout_s: float = 1.0) -> str:
    return fabric.run([sys.executable, "-c", TRY, address, str(timeout_s)], hosts=[source]).check().outputs["0"].strip()


def test_a_flow_takes_one_path_and_its_bytes_are_counted_there(up: Up) -> None:
    carried = sent(up(LeafSpine(rate="400mbit")), 1_000_000, 1)
    ups = sorted(carried["up", 1, spine] for spine in range(4))
    downs = sorted(carried["down", 0, spine] for spine in range(4))
    assert 1_000_000 < ups[-1] < 1_100_000
    assert 1_000_000 < downs[-1] < 1_100_000
    assert ups[-2] < 20_000 > downs[-2]


def test_many_flows_are_spread_over_all_spines_by_their_ports_and_another_seed_moves_them(up: Up) -> None:
    fabric = LeafSpine(rate="400mbit", seed=3)
    up(fabric)

    def path(port: int) -> int:
        before = fabric.counters()
        fabric.run([sys.executable, "-c", DATAGRAMS, fabric.address(0), str(port)], hosts=[1]).check()
        after = fabric.counters()
        return max(range(4), key=lambda spine: after["up", 1, spine] - before["up", 1, spine])

    def paths() -> list[int]:
        return [path(port) for port in range(41000, 41012)]

    first = paths()
    assert len(set(first)) >= 3
    fabric.reseed(4)
    assert paths() != first


def test_a_link_that_goes_down_is_routed_around_and_one_that_is_silent_is_not(up: Up) -> None:
    fabric = up(LeafSpine(spines=2))
    target = fabric.address(1)
    fabric.link(0, 0).down()
    assert all(reached(fabric, 0, target) == "refused" for _ in range(4))
    carried = sent(fabric, 100_000, 4)
    assert carried["up", 1, 0] < 20_000
    assert carried["up", 1, 1] > 400_000
    fabric.link(0, 0).restore()
    for spine in range(2):
        fabric.link(1, spine).silence()
    assert reached(fabric, 0, target, 0.5) == "silent"
    fabric.link(1, 0).restore()
    fabric.link(1, 1).restore()
    assert reached(fabric, 0, target) == "refused"


def test_a_plane_leads_where_its_interface_does_and_can_be_slowed(up: Up) -> None:
    fabric = up(MultiPlane(hosts=2, rates=["400mbit", "400mbit"]))
    carried = sent(fabric, 500_000, 1, fabric.address(0, 1))
    assert carried["up", 1, 1] > 500_000 < carried["down", 0, 1]
    assert carried["up", 1, 0] < 20_000
    fabric.link(1, 1).silence()
    assert reached(fabric, 0, fabric.address(1, 1), 0.5) == "silent"
    assert reached(fabric, 0, fabric.address(1, 0)) == "refused"
    fabric.link(1, 1).down()
    fabric.link(1, 1).restore()
    assert reached(fabric, 0, fabric.address(1, 1)) == "refused"


def test_a_rate_is_kept_both_ways(up: Up) -> None:
    timed = f"import time; began = time.monotonic()\n{SEND}\nprint(time.monotonic() - began)"
    fabric = up(LeafSpine(spines=1, rate="400mbit"))
    fabric.link(0, 0).slow("8mbit")
    outcome = fabric.run([sys.executable, "-c", timed, "1000000", "1", "0"]).check()
    assert float(outcome.outputs["1"]) > 0.9  # what the bucket holds at first goes at once


def test_ranks_are_told_who_they_are_and_one_that_fails_ends_all(up: Up) -> None:
    fabric = up(LeafSpine())
    told = "import os; print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')))"
    outcome = fabric.run([sys.executable, "-c", told], per_host=2).check()
    assert [outcome.outputs[name].split() for name in "0123"] == [
        ["0", "4", "0", "10.1.0.2"],
        ["1", "4", "1", "10.1.0.2"],
        ["2", "4", "0", "10.1.0.2"],
        ["3", "4", "1", "10.1.0.2"],
    ]
    fails = "import os, sys, time; sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert fabric.run([sys.executable, "-c", fails]).code == 5
    assert fabric.run([sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=0.2).code == 124


def test_networks_side_by_side_do_not_see_each_other(up: Up) -> None:
    one, other = up(LeafSpine(rate="400mbit")), up(LeafSpine(rate="400mbit"))
    before = other.counters()
    sent(one, 1_000_000, 1)
    assert all(count - before[link] < 20_000 for link, count in other.counters().items())


OWNER = """
import sys, time
sys.path.append(sys.argv[1])
from examples.fabric import LeafSpine
sleep = "import time; print('here', flush=True); time.sleep(600)"
with LeafSpine() as fabric, fabric.launch([sys.executable, "-c", sleep]) as job:
    end = time.monotonic() + 60
    while time.monotonic() < end and not all("here" in job.output(name) for name in job.processes):
        time.sleep(0.02)
    print(*(process.pid for process in job.processes.values()), flush=True)
    time.sleep(600)
"""

# Who is killed while it starts programs has started some of them whom nobody has told yet to end with it.
HASTY = """
import os, sys
sys.path.append(sys.argv[1])
from examples.netns import Namespaces, Program
with Namespaces() as spaces:
    spaces.make(["a"])
    command = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[2]]
    with spaces.launch([Program(name=str(number), space="a", command=command) for number in range(4)]):
        os.kill(os.getpid(), 9)
"""


def test_nothing_is_left_of_programs_whose_owner_dies_while_they_start(
    up: Up, eventually: Callable[..., None], tmp_path: Path
) -> None:
    up(LeafSpine())  # skips where there are none
    subprocess.run([sys.executable, "-c", HASTY, str(ROOT), str(tmp_path)], timeout=60)

    def running() -> bool:
        return any(str(tmp_path).encode() in _words(entry) for entry in Path("/proc").glob("[0-9]*/cmdline"))

    eventually(lambda: not running(), "the programs end with their owner")


def _words(entry: Path) -> bytes:
    try:
        return entry.read_bytes()
    except OSError:  # it has ended
        return b""


def test_nothing_is_left_of_a_network_whose_owner_was_killed(up: Up, eventually: Callable[..., None]) -> None:
    up(LeafSpine())  # skips where there are none
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout as lines:
        pids = [int(word) for word in lines.readline().split()]
        spaces = [os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids]
        owner.send_signal(signal.SIGKILL)
        owner.wait(20)
    assert len(set(spaces)) == 2

    def used() -> set[int]:
        found = set()
        for entry in Path("/proc").glob("[0-9]*/ns/net"):
            try:
                found.add(os.stat(entry).st_ino)
            except OSError:  # it has ended
                continue
        return found

    eventually(lambda: not used() & set(spaces), "the programs in the namespaces end with their owner")
