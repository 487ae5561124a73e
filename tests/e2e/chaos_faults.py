"""The cluster of the chaos run (`chaos.py`) and what is done to it. Groups are started again when a process of theirs ends, as
by Kubernetes; a router takes requests when it is ready, as behind a load balancer."""

import collections
import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time

from chaos_load import MODEL, OTHER_MODEL
from cluster import SIGCONT, SIGSTOP, http, wait_until

# Above it a router sheds connections: the run itself needs about 120 of them.
ROUTER_FILES = 256
ROUTER_OPTIONS = {
    # beyond the longest time without any group, and the longest response on a busy machine
    "wait_for_group_seconds": 120, "max_waiting_seconds": 240, "failover_wait_seconds": 120, "shutdown_grace_seconds": 240,
    # a request that is slow on a busy machine sees more deaths than a group's own poison would cause
    "max_attempts": 16,
    # ends a run in which something hangs
    "request_timeout_seconds": 300,
}


def fixed_port():
    """A port that no outgoing connection takes while its process is down."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Windows:
    """When something held: `(kind, where)` from one time to another."""

    def __init__(self):
        self.spans, self.lock = [], threading.Lock()

    def open(self, kind, where, since=None):
        """Opens a window and returns what closes it."""
        span = [kind, where, since or time.monotonic(), float("inf")]
        with self.lock:
            self.spans.append(span)

        def close():
            span[3] = min(span[3], time.monotonic())

        return close

    @contextlib.contextmanager
    def during(self, kind, where):
        close = self.open(kind, where)
        try:
            yield
        finally:
            close()

    def overlap(self, kinds, where, since, until, margin=3.0):
        """Whether one of the windows held between two times."""
        with self.lock:
            return any(kind in kinds and place == where and start <= until + margin and since <= end + margin for kind, place, start, end in self.spans)


class Router:
    def __init__(self, fleet, name):
        self.fleet, self.name, self.ready = fleet, name, None
        # whether clients ask it, whether it has been told to stop, and whether it cannot even accept connections
        self.in_rotation, self.is_stopping, self.is_out_of_files = False, False, False
        admin = fixed_port()
        fleet.cluster.sections = {"http": {"admin": f"127.0.0.1:{admin}"}}
        self.process = fleet.cluster.start_router(name, port=fixed_port(), files=ROUTER_FILES, **ROUTER_OPTIONS)
        fleet.cluster.sections = {}
        self.url, self.admin = self.process.url, f"http://127.0.0.1:{admin}"
        self.closers = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def is_ready(self):
        return self.process.running() and http("GET", self.admin + "/ready", timeout=5)[0] == 200

    def _watch(self):
        """Notes which groups it holds ready, and when it has none of a model."""
        last = time.monotonic()
        while not self.fleet.closed.wait(0.4):
            try:
                status, _, body = http("GET", self.admin + "/groups", timeout=5)
                groups = body["groups"] if status == 200 else None
            except (OSError, TypeError):
                groups = None
            if groups is None:
                self.ready = None
                continue
            ready = {(group["model"], group["group"]) for group in groups if group["state"] == "ready" and group["watched"]}
            for model in (MODEL, OTHER_MODEL):
                if not any(one == model for one, _ in ready):
                    if model not in self.closers:
                        self.closers[model] = self.fleet.windows.open("no group", (self.name, model), last)
                elif model in self.closers:
                    self.closers.pop(model)()
            self.ready, last = {group for _, group in ready}, time.monotonic()

    def restart(self, stderr=None):
        """SIGTERM, and a start when it has ended."""
        began, self.is_stopping = time.monotonic(), True
        with self.fleet.windows.during("stopping", self.name):
            self.process.signal(signal.SIGTERM)
            status = self.wait_exit()
            self.in_rotation = False
        self.fleet.journal(f"{self.name} ended with status {status} after {time.monotonic() - began:.1f} s")
        if status != 0:
            self.fleet.broken.append(f"{self.name} ended with status {status} at SIGTERM")
        self.process.start(stderr=stderr)
        wait_until(f"{self.name} is ready", self.is_ready, 300, every=0.2)
        self.in_rotation, self.is_stopping = True, False


    def wait_exit(self):
        """Notes what holds it up, if it takes long."""
        for _ in range(int(ROUTER_OPTIONS["shutdown_grace_seconds"] / 30) + 1):
            try:
                return self.process.child.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    self.fleet.journal(f"{self.name} still stops, open requests: {json.dumps(http('GET', self.admin + '/requests', timeout=5)[2])[:1500]}")
        raise AssertionError(f"{self.name} does not end")


class Group:
    """The processes of a group, its leader first."""

    def __init__(self, fleet, name, ranks=1):
        self.fleet, self.name, self.is_hit, self.is_held, self.is_told_to_stop = fleet, name, False, False, False
        self.lock, self.stderr = threading.RLock(), None
        start = fleet.cluster.start_worker
        if ranks == 1:
            self.processes = [start(name, port=fixed_port(), model=MODEL)]
        else:
            self.processes = [start(name, ranks=[rank], size=ranks, port=fixed_port(), model=MODEL) for rank in range(ranks)]
        threading.Thread(target=self._supervise, daemon=True).start()

    @property
    def leader(self):
        return self.processes[0]

    def is_ready(self):
        """As all routers see it that take requests."""
        return self.fleet.holds_ready(self.name)

    def signal(self, number, processes=None):
        with self.lock:
            for process in processes or self.processes:
                process.signal(number)

    @contextlib.contextmanager
    def hit(self):
        """Until it is back, nothing else is done to it."""
        self.is_hit = True
        try:
            yield
            self.fleet.over.wait(1.5)
            wait_until(f"{self.name} is back", lambda: self.is_ready() or self.fleet.over.is_set(), 240, every=0.2)
        finally:
            self.is_hit = False

    def _supervise(self):
        while not self.fleet.closed.wait(0.2):
            with self.lock:
                ended = [process for process in self.processes if not process.running()]
                if self.is_held or not ended:
                    continue
            self.fleet.journal(f"{self.name}: " + ", ".join(f"{process.name} ended with status {process.child.returncode}" for process in ended))
            if not self.is_hit:
                self.fleet.exits += 1
            # the others end by themselves, or do not respond; those that drain may take their time
            end = time.monotonic() + (150 if self.is_told_to_stop else 20)
            while time.monotonic() < end and any(process.running() for process in self.processes):
                time.sleep(0.1)
            time.sleep(random.uniform(0.2, 1.5))
            with self.lock:
                self.is_told_to_stop = False
                for process in self.processes:
                    process.kill()
                if not self.is_held and not self.fleet.closed.is_set():
                    for process in self.processes:
                        process.start(stderr=self.stderr)


class Fleet:
    """etcd, two routers and three groups, one of them of two ranks in two processes."""

    def __init__(self, cluster, windows, journal):
        self.cluster, self.windows, self.journal = cluster, windows, journal
        self.over, self.closed, self.broken, self.exits = threading.Event(), threading.Event(), [], 0
        self.groups, self.routers, self.pipes = [], [], []

    def start(self):
        self.cluster.etcd_port, self.cluster.etcd_peer_port = fixed_port(), fixed_port()
        self.cluster.start_etcd()
        self.groups += [Group(self, "g0"), Group(self, "g1"), Group(self, "pair", ranks=2)]
        self.routers += [Router(self, "r0"), Router(self, "r1")]
        for router in self.routers:
            router.in_rotation = True
        self.wait_ready()

    def holds_ready(self, group):
        """Whether all routers that take requests hold a group ready."""
        return all(router.ready and group in router.ready for router in self.routers if router.in_rotation and not router.is_stopping)

    def wait_ready(self, seconds=120):
        wait_until("all groups are ready", lambda: all(group.is_ready() for group in self.groups), seconds, every=0.2)

    @contextlib.contextmanager
    def other_model(self, address=None):
        """A group of another model, for a while."""
        port = int(address.rsplit(":", 1)[1]) if address else fixed_port()
        worker = self.cluster.start_worker("other", port=port, model=OTHER_MODEL)
        try:
            wait_until("the other model is served", lambda: self.holds_ready("other"), 120, every=0.2)
            yield
        finally:
            worker.signal(signal.SIGTERM)
            worker.wait_exit(150)
            self.cluster.processes.remove(worker)

    def unread_pipe(self):
        """A standard error of one page that nobody reads."""
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self.pipes.append(reader)
        return os.fdopen(writer, "wb")

    def close(self):
        """Nothing is watched and started again any more."""
        self.closed.set()
        for reader in self.pipes:
            os.close(reader)


class Faults:
    """Injects one fault after the other, several at a time, each kind as often as the others."""

    OF_GROUPS = ["kill a leader", "kill a rank", "kill all groups", "stop a group", "stop a rank", "terminate a group", "recycled address"]
    KINDS = [*OF_GROUPS, "terminate a router", "kill etcd", "stop etcd", "restart etcd", "delete all keys", "delete a key",
             "log disk full", "log pipe unread", "idle connections", "open files limit"]

    def __init__(self, fleet, seed, load, other_cases, pause=(1.2, 3.0)):
        self.fleet, self.load, self.other_cases, self.pause = fleet, load, other_cases, pause
        self.rng, self.over = random.Random(seed), fleet.over
        self.injected = collections.Counter()
        self.etcd, self.router = threading.Lock(), threading.Lock()  # one fault of each at a time
        self.files = {router.name: threading.Lock() for router in fleet.routers}
        self.threads, self.bag = [], []

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.inject()
            self.over.wait(self.rng.uniform(*self.pause))
        self.over.set()
        for thread in self.threads:
            thread.join()

    def inject(self):
        """The next fault that is possible now."""
        if not self.bag:
            self.bag = self.rng.sample(self.KINDS, len(self.KINDS))
        spares_groups = False
        for kind in list(self.bag):
            fault = None if spares_groups and kind in self.OF_GROUPS else self.prepare(kind)
            if fault is None and kind == self.bag[0] == "kill all groups":
                spares_groups = True  # it wants all of them whole, and would never have its turn
            if fault is not None:
                self.bag.remove(kind)
                self.injected[kind] += 1
                thread = threading.Thread(target=self._run, args=(kind, fault))
                self.threads.append(thread)
                thread.start()
                return

    def _run(self, kind, fault):
        try:
            fault()
        except Exception as error:  # the run goes on, and fails
            self.fleet.broken.append(f"{kind}: {error}")

    # ---- what is possible now

    def prepare(self, kind):
        """What does it, or nothing if it is not possible now."""
        rng, fleet = self.rng, self.fleet
        seconds = rng.uniform(2, 12)
        if kind in ("kill etcd", "stop etcd", "restart etcd"):
            return self._exclusive(self.etcd, lambda: getattr(self, kind.replace(" ", "_"))(seconds))
        if kind in ("delete all keys", "delete a key"):
            return self._exclusive(self.etcd, lambda: self.delete_keys(kind == "delete all keys", rng.random()))
        if kind in ("idle connections", "open files limit"):
            router = rng.choice(fleet.routers)
            if router.is_stopping:
                return None
            fault = self._exclusive(self.files[router.name], lambda: getattr(self, kind.replace(" ", "_"))(router, seconds))
            router.is_out_of_files |= fault is not None and kind == "open files limit"
            return fault
        stderr = {"log disk full": lambda: open("/dev/full", "wb"), "log pipe unread": fleet.unread_pipe}.get(kind)
        if kind == "terminate a router" or stderr and rng.random() < 0.5:
            router = rng.choice(fleet.routers)
            if router.is_out_of_files:
                return None  # what it could not accept would be reset when it closes its port
            return self._exclusive(self.router, lambda: self.terminate_router(router, kind, stderr))
        whole = [group for group in fleet.groups if not group.is_hit and group.is_ready()]
        if kind == "kill all groups":
            return (lambda: self.kill_all(seconds)) if len(whole) == len(fleet.groups) else None
        if len(whole) < 2:
            return None  # one stays
        pair = [group for group in whole if len(group.processes) > 1]
        if kind in ("kill a rank", "stop a rank"):
            if not pair:
                return None
            group = pair[0]
            processes = [rng.choice(group.processes)]
        else:
            group = rng.choice(whole)
            processes = [group.leader] if kind == "kill a leader" else group.processes
        group.is_hit = True
        if kind == "recycled address":
            return lambda: self.recycle(group, seconds)
        if kind.startswith("stop"):
            return lambda: self.stop(kind, group, processes, seconds)
        if kind.startswith("kill"):
            return lambda: self.kill(kind, group, processes)
        return lambda: self.terminate(kind, group, stderr)

    def _exclusive(self, lock, fault):
        if not lock.acquire(blocking=False):
            return None

        def run():
            try:
                fault()
            finally:
                lock.release()

        return run

    # ---- groups

    def kill(self, kind, group, processes):
        self.fleet.journal(f"{kind}: {', '.join(process.name for process in processes)}")
        with group.hit():
            group.signal(signal.SIGKILL, processes)

    def kill_all(self, seconds):
        self.fleet.journal("kill all groups")
        with contextlib.ExitStack() as stack:
            for group in self.fleet.groups:
                stack.enter_context(group.hit())
                group.signal(signal.SIGKILL)

    def stop(self, kind, group, processes, seconds):
        self.fleet.journal(f"{kind}: {', '.join(process.name for process in processes)} for {seconds:.1f} s")
        with group.hit():
            group.signal(SIGSTOP, processes)
            self.over.wait(seconds)
            group.signal(SIGCONT, processes)

    def terminate(self, kind, group, stderr):
        self.fleet.journal(f"{kind}: {group.name}")
        with group.hit():
            group.stderr = stderr and stderr()
            group.is_told_to_stop = True
            group.signal(signal.SIGTERM)
            # longer than its drain: a process that is the same after it has not ended
            before = group.leader.child
            wait_until(f"{group.name} is started again", lambda: group.leader.child is not before, 240)

    def recycle(self, group, seconds):
        """It is killed, a group of another model gets its address, and it comes back at another one."""
        self.fleet.journal(f"recycled address: {group.leader.address} of {group.name}")
        with group.hit():
            address = group.leader.address
            with group.lock:
                group.is_held = True
                for process in group.processes:
                    process.kill()
                config = self.fleet.cluster.path / f"{group.leader.name}.yaml"
                group.leader.address = f"127.0.0.1:{fixed_port()}"
                config.write_text(config.read_text().replace(address, group.leader.address))
            try:
                with self.fleet.other_model(address):
                    group.is_held = False
                    for number, case in enumerate(self.other_cases * 2):
                        self.load.ask(f"other-{self.injected['recycled address']}-{number}", case, number % 2 == 0)
                    self.over.wait(seconds)
            finally:
                group.is_held = False

    # ---- routers

    def terminate_router(self, router, kind, stderr):
        self.fleet.journal(f"{kind}: {router.name}")
        router.restart(stderr and stderr())

    def idle_connections(self, router, seconds):
        """More connections than it has files, made again when it closes them."""
        self.fleet.journal(f"idle connections: {router.name} for {seconds:.1f} s")
        address = ("127.0.0.1", int(router.url.rsplit(":", 1)[1]))
        idle, end = collections.deque(), time.monotonic() + seconds
        with self.fleet.windows.during("files", router.name):
            while time.monotonic() < end and not self.over.is_set():
                try:
                    idle.append(socket.create_connection(address, timeout=1))
                except OSError:
                    time.sleep(0.05)  # it has stopped, or accepts none
                if len(idle) > ROUTER_FILES + 64:
                    idle.popleft().close()
                    time.sleep(0.01)
            for one in idle:
                one.close()

    def open_files_limit(self, router, seconds):
        """Room for three more files than it has open."""
        process = router.process.child.pid
        files = len(os.listdir(f"/proc/{process}/fd")) + 3
        before = resource.prlimit(process, resource.RLIMIT_NOFILE)
        self.fleet.journal(f"open files limit: {router.name} has {files} for {seconds:.1f} s")
        with self.fleet.windows.during("files", router.name):
            resource.prlimit(process, resource.RLIMIT_NOFILE, (files, before[1]))
            self.over.wait(seconds)
            resource.prlimit(process, resource.RLIMIT_NOFILE, before)
            # what waited to be accepted
            time.sleep(2)
        router.is_out_of_files = False

    # ---- etcd

    def kill_etcd(self, seconds):
        self.fleet.journal(f"kill etcd, back after {seconds:.1f} s")
        self.fleet.cluster.etcd.kill()
        self.over.wait(seconds)
        self.start_etcd()

    def restart_etcd(self, _):
        self.fleet.journal("restart etcd")
        self.fleet.cluster.etcd.stop()
        self.start_etcd()

    def start_etcd(self):
        self.fleet.cluster.etcd.start()
        self.fleet.cluster.wait_etcd()

    def stop_etcd(self, seconds):
        self.fleet.journal(f"stop etcd for {seconds:.1f} s")
        self.fleet.cluster.etcd.signal(SIGSTOP)
        self.over.wait(seconds)
        self.fleet.cluster.etcd.signal(SIGCONT)
        self.fleet.cluster.wait_etcd()

    def delete_keys(self, all_of_them, choice):
        keys = self.fleet.cluster.etcdctl("get", "--prefix", "--keys-only", "/bora/").split()
        if all_of_them or not keys:
            self.fleet.journal(f"delete all keys: {len(keys)}")
            self.fleet.cluster.etcdctl("del", "--prefix", "/bora/")
        else:
            key = keys[int(choice * len(keys))]
            self.fleet.journal(f"delete a key: {key}")
            self.fleet.cluster.etcdctl("del", key)
