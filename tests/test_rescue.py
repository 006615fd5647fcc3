"""A workdir that can't be written for a while: the run goes on, and ends as one that was not
disturbed. The faults are real: file systems that are full, read-only or gone."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from small_runs import SMALL, assert_ended_alike, command, finish, read_eval, read_until
from test_faults import flip_bits, refused
from test_tensorboard import curves

from experiments.training_run import lock
from experiments.training_run.config import parse
from experiments.training_run.metric_writer import TAGS
from experiments.training_run.rescue import rescue_folder

FLAGS = ["--epochs", "12", "--checkpoint-every", "0"]
# The result is the best epoch, which lies in the outage of a run that ends in one.
VALIDATED = [*FLAGS, "--validation-size", "400"]
SIZE = "4m"  # of the small file systems; the checkpoints of a run take 1 MB


class Machine:
    """A mount namespace of its own, which goes away with all its mounts."""

    def __init__(self):
        self.at_last = []  # what to call before it goes away
        self._init = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", "echo; read _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not self._init.stdout.readline():
            reason = self._init.communicate()[1].strip()
            pytest.skip(f"nothing can be mounted here ({reason}); root can")

    @property
    def inside(self):
        """The beginning of a command that runs inside."""
        return ["nsenter", "--target", str(self._init.pid), "--mount", f"--wd={os.getcwd()}"]

    def do(self, *command):
        subprocess.run([*self.inside, *map(str, command)], check=True)

    def see(self, path):
        """Where a path inside is for us."""
        return Path(f"/proc/{self._init.pid}/root{path}")

    def stop(self):
        for call in self.at_last:
            call()
        self._init.communicate()


@pytest.fixture
def machine():
    with contextlib.ExitStack() as stack:
        machine = Machine()
        stack.callback(machine.stop)
        yield machine


class Full:
    """A disk that fills up."""

    reason = "No space left on device"

    def __init__(self, machine, folder):
        self.machine, self.workdir = machine, folder / "disk" / "run"
        (folder / "disk").mkdir()
        machine.do("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder / "disk")
        self._filling = machine.see(folder / "disk" / "filling")

    def begin(self):
        with self._filling.open("wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(self._filling.parent).free == 0

    def end(self):
        self._filling.unlink()


class ReadOnly:
    """A disk that turns read-only, as after an error in its file system."""

    reason = "Read-only file system"

    def __init__(self, machine, folder):
        self.machine, self.workdir = machine, folder / "disk" / "run"
        self._disk = folder / "disk"
        self._disk.mkdir()
        machine.do("mount", "-t", "tmpfs", "none", self._disk)

    def begin(self):
        # A second mount over it, because the file system has a file open for writing: the lock.
        self.machine.do("mount", "--bind", self._disk, self._disk)
        self.machine.do("mount", "-o", "remount,bind,ro", self._disk)

    def end(self):
        self.machine.do("umount", self._disk)


class NotPermitted:
    """A folder that nobody may change, not even root."""

    reason = "Operation not permitted"

    def __init__(self, machine, folder):
        self.machine, self.workdir = machine, folder / "run"
        self.workdir.mkdir()
        (self.workdir / "checkpoints").mkdir()
        machine.at_last.append(self.end)
        probe = subprocess.run(["chattr", "+i", self.workdir], capture_output=True, text=True)
        if probe.returncode:
            pytest.skip(f"this file system has no immutable folders ({probe.stderr.strip()})")
        self.end()

    def begin(self):
        for folder in (self.workdir / "checkpoints", self.workdir):
            self.machine.do("chattr", "+i", folder)

    def end(self):
        for folder in (self.workdir, self.workdir / "checkpoints"):
            subprocess.run(["chattr", "-i", folder], capture_output=True)


class Unmounted:
    """A disk that is taken away and comes back; where it was there is an empty folder."""

    reason = "does not hold the run any more, perhaps because its mount is gone"

    def __init__(self, machine, folder):
        self.machine, self.workdir = machine, folder / "run"
        self._disk = folder / "disk"
        self._disk.mkdir()
        self.workdir.mkdir()
        self.end()

    def begin(self):
        self.machine.do("umount", "--lazy", self.workdir)

    def end(self):
        self.machine.do("mount", "--bind", self._disk, self.workdir)


class Disconnected(Unmounted):
    """A FUSE file system whose daemon is killed, and that is mounted anew."""

    reason = "Transport endpoint is not connected"

    def __init__(self, machine, folder):
        if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
            pytest.skip("needs bindfs and /dev/fuse (apt-get install bindfs)")
        super().__init__(machine, folder)
        machine.at_last.append(self.begin)

    def begin(self):
        self._daemon.kill()
        self._daemon.wait()

    def end(self):
        subprocess.run(  # what is left of the mount before
            [*self.machine.inside, "umount", "--lazy", self.workdir], capture_output=True
        )
        self._daemon = subprocess.Popen(
            [*self.machine.inside, "bindfs", "-f", self._disk, self.workdir],
            stdout=subprocess.DEVNULL,
        )
        mounts = Path(f"/proc/{self._daemon.pid}/mountinfo")
        while f" {self.workdir} " not in mounts.read_text():
            assert self._daemon.poll() is None


FAULTS = [Full, ReadOnly, NotPermitted, Unmounted, Disconnected]


@pytest.fixture(params=FAULTS, ids=lambda fault: fault.__name__)
def fault(request, machine, tmp_path):
    return request.param(machine, tmp_path)


@pytest.fixture
def rescue_dir(tmp_path):
    """A folder for rescued states, which lies on another disk than the workdir."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed_run(data_dir, made_once):
    """The workdir of a run that nobody disturbed."""
    return made_once("undisturbed", lambda workdir: finish(data_dir, workdir, *FLAGS))


@pytest.fixture(scope="module")
def validated_run(data_dir, made_once):
    """The same with a validation set."""
    return made_once("validated", lambda workdir: finish(data_dir, workdir, *VALIDATED))


TOLD = ("warning", "error", "run", "stopped")


class Run:
    """A run inside a machine, that can be held while the machine is changed."""

    def __init__(self, fault, data_dir, *flags):
        self.lines = []
        begun = [*fault.machine.inside, *command(data_dir, fault.workdir, *flags)]
        fault.machine.at_last.append(self._kill)
        self.process = subprocess.Popen(
            begun,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

    def _kill(self):
        self.process.kill()
        self.process.communicate()

    def reach(self, beginning):
        """Go on up to a line that begins so."""
        self.lines += read_until(self.process, beginning)
        assert self.lines[-1].startswith(beginning), "".join(self.lines)

    @contextlib.contextmanager
    def held(self):
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def end(self):
        """Go on to the end; returns the status and the lines that tell of faults."""
        self.lines += self.process.communicate(timeout=300)[0].splitlines(keepends=True)
        output = "".join(self.lines)
        assert "Traceback" not in output, output
        told = [line.rstrip("\n") for line in self.lines if line.startswith(TOLD)]
        return self.process.returncode, told


def assert_recovered(fault, undisturbed):
    assert_ended_alike(fault.machine.see(fault.workdir), undisturbed)


def reach_outage(run, fault):
    run.reach("epoch  3/12")
    with run.held():
        fault.begin()
    run.reach("warning: ")


@pytest.mark.slow
def test_a_workdir_that_fails_in_mid_run_and_comes_back(
    data_dir, undisturbed_run, rescue_dir, fault
):
    run = Run(fault, data_dir, "--rescue-dir", rescue_dir, *FLAGS, "--tensorboard")
    reach_outage(run, fault)
    (kept,) = rescue_dir.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o700
    run.reach("epoch")
    with run.held():
        fault.end()
    run.reach("run     saved step")
    assert list(rescue_dir.iterdir()) == []
    status, told = run.end()
    assert status == 0
    warning, back, evaluating = told
    assert fault.reason in warning
    assert warning.endswith(
        f"training goes on and tries again at each save; meanwhile the last state is kept in {kept}"
    )
    assert back.endswith(f" in {fault.workdir} again")
    assert evaluating == "run     evaluating step 168"
    assert_recovered(fault, undisturbed_run)
    shown = curves(fault.machine.see(fault.workdir))
    for tag in set(TAGS.values()) - {"loss/validation", "accuracy/validation"}:
        assert [step for step, _ in shown[tag]] == list(range(14, 169, 14)), tag


@pytest.mark.slow
def test_a_run_that_ends_while_its_workdir_is_gone(data_dir, validated_run, rescue_dir, machine):
    fault = Unmounted(machine, rescue_dir.parent)
    flags = ["--rescue-dir", rescue_dir, *VALIDATED]
    run = Run(fault, data_dir, *flags)
    reach_outage(run, fault)
    status, (_, last) = run.end()
    (kept,) = rescue_dir.iterdir()
    assert status == 0
    assert last == (
        f"warning: {fault.workdir} {fault.reason}; the last state, of step 144, is kept in {kept}: "
        f"make {fault.workdir} writable again and run the same command"
    )
    # Nothing is begun where the mount comes back; a save that was under way may go on there.
    assert {path.name for path in machine.see(fault.workdir).iterdir()} <= {"checkpoints"}

    fault.end()
    status, told = Run(fault, data_dir, *flags).end()
    assert status == 0
    assert told[:3] == [
        f"run     the state of step 144 was kept in {kept}",
        f"run     saved step 144 in {fault.workdir} again",
        "run     finished at step 144",
    ]
    assert list(rescue_dir.iterdir()) == []
    assert_recovered(fault, validated_run)


@pytest.mark.slow
def test_a_signal_while_the_workdir_is_gone(data_dir, undisturbed_run, rescue_dir, machine):
    fault = Unmounted(machine, rescue_dir.parent)
    flags = ["--rescue-dir", rescue_dir, *FLAGS]
    run = Run(fault, data_dir, *flags)
    reach_outage(run, fault)
    run.process.send_signal(signal.SIGTERM)
    status, told = run.end()
    (kept,) = rescue_dir.iterdir()
    step = max(int(path.name) for path in (kept / "checkpoints").iterdir())
    assert status == 143
    assert told[-1] == (
        f"stopped by SIGTERM: the last state, of step {step}, is kept in {kept}: make "
        f"{fault.workdir} writable again and run the same command to resume"
    )

    fault.end()
    status, told = Run(fault, data_dir, *flags).end()
    assert status == 0
    assert told[0] == f"run     the state of step {step} was kept in {kept}"
    assert told[2].startswith(f"run     resuming from step {step}, in epoch ")
    assert_recovered(fault, undisturbed_run)


@pytest.mark.slow
def test_a_state_that_can_be_saved_nowhere(data_dir, undisturbed_run, tmp_path, machine):
    fault = Full(machine, tmp_path)
    flags = ["--rescue-dir", tmp_path / "disk", *FLAGS]  # full as well
    run = Run(fault, data_dir, *flags)
    reach_outage(run, fault)
    status, (warning, error) = run.end()
    assert status == 2
    for line in (warning, error):
        assert line.count("(No space left on device)") == 2, line
    assert "the state is lost if the run ends before" in warning
    assert "the state of step 168 is lost, and the same command resumes from the last" in error

    fault.end()
    status, told = Run(fault, data_dir, *flags).end()
    assert status == 0
    assert any("resuming from step" in line for line in told)
    assert_recovered(fault, undisturbed_run)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of it without its last checkpoint."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "42")
    return workdir


@pytest.fixture
def rescued(finished, workdir, rescue_dir):
    """The rescue folder of that copy, which holds the checkpoint."""
    folder = rescue_folder(parse(["--workdir", str(workdir), "--rescue-dir", str(rescue_dir)]))
    folder.mkdir(mode=0o700)
    shutil.copytree(finished / "checkpoints" / "42", folder / "checkpoints" / "42")
    return folder


def test_a_rescued_state_is_brought_back(run, finished, workdir, rescued):
    status, output, error = run("--workdir", workdir, "--rescue-dir", rescued.parent)
    assert (status, error) == (0, "")
    assert f"run     the state of step 42 was kept in {rescued}\n" in output
    assert "run     finished at step 42\n" in output
    assert not rescued.exists()
    assert_ended_alike(workdir, finished)


def make_link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def give_away(folder):
    if os.geteuid():
        pytest.skip("only root can give a folder to another user")
    os.chown(folder, 65534, 65534)


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("mine")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (make_link, "it is a link"),
        (give_away, "it is another user's"),
        (lambda folder: folder.chmod(0o770), "other users can open it"),
        (replace_by_file, "it is not a folder"),
    ],
)
def test_a_rescue_folder_that_is_not_private_is_left_alone(
    run, finished, workdir, rescued, harm, reason
):
    harm(rescued)
    before = [(path, path.lstat()) for path in sorted(rescued.parent.rglob("*"))]
    status, output, error = run("--workdir", workdir, "--rescue-dir", rescued.parent)
    assert error == f"warning: {rescued} can't be used to keep the state ({reason})\n"
    assert status == 0
    assert "resuming from step 28" in output
    assert [(path, path.lstat()) for path in sorted(rescued.parent.rglob("*"))] == before
    assert read_eval(workdir) == read_eval(finished)


def test_a_damaged_rescued_state_is_said(run, finished, workdir, rescued):
    flip_bits(rescued / "checkpoints" / "42")
    status, output, error = run("--workdir", workdir, "--rescue-dir", rescued.parent)
    assert status == 0
    assert error.startswith(f"warning: no checkpoint in {rescued}/checkpoints can be restored: ")
    assert error.endswith(f"; going on from step 28 of {workdir}\n")
    assert "resuming from step 28" in output
    assert read_eval(workdir) == read_eval(finished)


def test_another_run_in_the_same_place_takes_no_rescued_state(run, workdir, rescued):
    """Not by the folder's name and, should it have that name all the same, not by its config."""
    shutil.rmtree(workdir)
    flags = ["--workdir", workdir, "--rescue-dir", rescued.parent, *SMALL, "--epochs", 3]
    flags += ["--seed", 1]
    status, output, error = run(*flags)
    assert (status, error) == (0, "")
    assert "resuming" not in output
    assert [path.name for path in (rescued / "checkpoints").iterdir()] == ["42"]

    shutil.rmtree(workdir)
    rescued.rename(rescue_folder(parse([*map(str, flags)])))
    status, output, error = run(*flags)
    assert status == 0
    assert "are another run's: --seed is 1, but the run's is 0; going on from step 0" in error
    assert error.count("\n") == 1
    assert "resuming" not in output


def test_a_rescued_state_that_the_workdir_holds_too_is_removed(run, finished, workdir, rescued):
    shutil.copytree(finished / "checkpoints" / "42", workdir / "checkpoints" / "42")
    status, output, error = run("--workdir", workdir, "--rescue-dir", rescued.parent)
    assert (status, error) == (0, "")
    assert "was kept" not in output
    assert not rescued.exists()


def test_a_rescued_run_of_more_epochs_is_not_cut_short(run, workdir, rescued):
    shutil.rmtree(workdir)
    flags = ["--workdir", workdir, "--rescue-dir", rescued.parent, *SMALL, "--epochs", 2]
    refused(run(*flags), f"--epochs is 2, but the run in {rescued} has trained 3 of 3")
    assert (rescued / "checkpoints" / "42").is_dir()


def test_a_rescued_state_in_use_is_not_taken(run, workdir, rescued):
    with lock.hold(rescued):
        refused(run("--workdir", workdir, "--rescue-dir", rescued.parent), "is in use by another")


def test_evaluation_says_that_a_later_state_was_rescued_and_changes_nothing(run, workdir, rescued):
    before = sorted(rescued.rglob("*"))
    flags = ["--workdir", workdir, "--rescue-dir", rescued.parent, "--eval-only"]
    status, output, error = run(*flags)
    assert status == 0
    assert error == (
        f"warning: this evaluates an earlier state; the last one, of step 42, is kept in "
        f"{rescued}: run the same command without --eval-only\n"
    )
    assert "evaluating step 28" in output
    assert sorted(rescued.rglob("*")) == before


def test_a_rescue_dir_that_is_no_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--workdir", tmp_path / "run", *SMALL, "--rescue-dir", tmp_path / "file"]
    refused(run(*flags), "--rescue-dir must be a folder")
