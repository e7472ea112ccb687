"""Processes that begin with the libraries imported: a test that needs one of its own waits a tenth of a second, not ten.

A server imports what every command of axolotl does and forks a process for each program that it is asked to run. The process
then is what `python program arguments` would be: its own `__main__`, arguments, environment, folder, output and end. Modules of
ours and the parts of axolotl that a command imports by itself are imported there, so that patches find what they find at
a user's. What a library reads from the environment while it is imported is that of the server.
"""

import array
import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELOADED = ("axolotl.cli.main", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


class Process:
    """As much of `subprocess.Popen` as tests use.

    Args:
        command: a Python program and its arguments.
        stdin: text.
        stdout: a file; by default a pipe.
        cwd, env: of the process; those of the caller by default.
    """

    def __init__(self, command, *, stdin="", stdout=None, cwd=None, env=None):
        self._ended = _connection()
        self.returncode = None
        request = {
            "command": list(map(str, command)),
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
        }
        with tempfile.TemporaryFile("w+") as given:
            given.write(stdin)
            given.seek(0)
            self._errors = tempfile.TemporaryFile("w+")
            reading, writing = os.pipe()
            self.stdout = os.fdopen(reading)
            files = [given.fileno(), writing if stdout is None else stdout.fileno()]
            files.append(self._errors.fileno())
            data = json.dumps(request).encode()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
            self._ended.sendmsg([len(data).to_bytes(8, "big")], [rights])
            self._ended.sendall(data)
            os.close(writing)
        self.pid = int.from_bytes(_read(self._ended, 8), "big")

    def poll(self):
        """The exit code, as `subprocess` gives it, or None while it runs."""
        return self._wait(0)

    def wait(self, timeout=300):
        if self._wait(timeout) is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout=300):
        """Output, which has to fit into a pipe until then, and errors."""
        out = self.stdout.read()
        self.wait(timeout)
        return out, self.errors()

    def errors(self):
        self._errors.seek(0)
        return self._errors.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout):
        if self.returncode is None:
            self._ended.settimeout(timeout)
            try:
                self.returncode = int.from_bytes(_read(self._ended, 8), "big", signed=True)
            except (TimeoutError, BlockingIOError):
                return None
        return self.returncode


def _read(connection, count):
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the server of tests/warm.py has ended")
        data += part
    return data


_server = {}


def _connection():
    if os.getpid() not in _server:
        folder = tempfile.TemporaryDirectory(prefix="warm-")
        path = f"{folder.name}/socket"
        # deepspeed reads the second where it is imported
        env = os.environ | {"HF_HOME": f"{folder.name}/hf", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen([sys.executable, __file__, path], env=env, stdin=subprocess.PIPE)
        _server[os.getpid()] = (path, process, folder)
        atexit.register(process.terminate)
    path, process, _ = _server[os.getpid()]
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            assert process.poll() is None, "the server of tests/warm.py did not start"
            time.sleep(0.05)


# ---------------------------------------------------------------- the server


def _serve(path):
    """Returns in a process that shall run a program: its request."""
    for name in PRELOADED:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        if 0 in select.select([listener, 0], [], [])[0]:
            os._exit(0)  # the other end is closed: whoever started this has ended
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            _reap()
            continue
        listener.close()
        _, rights, _, _ = (head := connection.recvmsg(8, socket.CMSG_SPACE(3 * 4)))
        files = array.array("i", rights[0][2])
        request = json.loads(_read(connection, int.from_bytes(head[0], "big")))
        if child := os.fork():  # this process waits for it, and says how it ended
            connection.sendall(child.to_bytes(8, "big"))
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            try:
                connection.sendall(code.to_bytes(8, "big", signed=True))
            finally:
                os._exit(0)
        connection.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        return request


def _reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _begin(request):
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    sys.path[1:1] = [
        p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path
    ]
    if "OMP_NUM_THREADS" in os.environ:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    _begin(_serve(sys.argv[1]))
    runpy.run_path(sys.argv[0], run_name="__main__")
