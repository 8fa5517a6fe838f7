"""A Buildbot master with SQLite and one worker: how long the log of one step takes, from its first line in the master's database to
its end there. LINES lines as LINE says; PORT and the one behind it are free."""

import json
import os
import sqlite3
import subprocess
import sys
import time

lines, line, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])

MASTER = """
from buildbot.plugins import *
command = ["sh", "-c", "yes %(line)r | head -n %(lines)d"]
BuildmasterConfig = {
    "workers": [worker.Worker("w", "p")],
    "protocols": {"pb": {"port": "tcp:%(port)d:interface=127.0.0.1"}},
    "change_source": [changes.PBChangeSource(port="tcp:%(next)d:interface=127.0.0.1", user="u", passwd="p")],
    "schedulers": [schedulers.AnyBranchScheduler(name="all", treeStableTimer=None, builderNames=["b"])],
    "builders": [util.BuilderConfig(name="b", workernames=["w"], factory=util.BuildFactory([
        steps.ShellCommand(name="log", command=command, usePTY=False)]))],
    "db": {"db_url": "sqlite:///state.sqlite"},
    "buildbotNetUsageData": None,
}
"""
MASTER_TAC = """
from twisted.application import service
from buildbot.master import BuildMaster
application = service.Application('buildmaster')
BuildMaster(".", "master.cfg", umask=None).setServiceParent(application)
"""
WORKER_TAC = """
from twisted.application import service
from buildbot_worker.bot import Worker
application = service.Application('buildbot-worker')
Worker("127.0.0.1", %(port)d, "w", "p", ".", 600, umask=None).setServiceParent(application)
"""
STATE = """select l.num_lines, l.complete from logs l join steps s on l.stepid = s.id
where s.name = 'log' and l.slug = 'stdio'"""
DEADLINE = time.monotonic() + 300


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def program(module, *arguments):
    run = "import sys; from %s import run; sys.argv[0] = 'run'; run()" % module
    return [sys.executable, "-c", run, *arguments]


def daemon(directory):
    with open(directory + ".log", "w") as log:
        arguments = program("twisted.scripts.twistd", "--nodaemon", "--no_save", "-y", "buildbot.tac")
        return subprocess.Popen(arguments, cwd=directory, stdout=log, stderr=log)


def wait(look, what):
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > DEADLINE:
            sys.exit("waited in vain for " + what)
        time.sleep(0.01)


def logged(path, text):
    with open(path) as file:
        return text in file.read()


def state():
    try:
        return (database.execute(STATE).fetchall() or [(0, 0)])[0]
    except sqlite3.OperationalError:  # The master writes.
        return (0, 0)


words = {"line": line, "lines": lines, "port": port, "next": port + 1}
write("master/master.cfg", MASTER % words)
write("master/buildbot.tac", MASTER_TAC)
write("worker/buildbot.tac", WORKER_TAC % words)
buildbot = "buildbot.scripts.runner"
subprocess.run(program(buildbot, "upgrade-master", "-q", "master"), check=True, stdout=subprocess.DEVNULL)
daemons = []
try:
    daemons.append(daemon("master"))
    wait(lambda: logged("master.log", "BuildMaster is running"), "the master")
    daemons.append(daemon("worker"))
    wait(lambda: logged("master.log", "attached"), "the worker")
    change = ["--master", "127.0.0.1:%d" % (port + 1), "--auth", "u:p", "--who", "bench", "--branch", "b", "file"]
    subprocess.run(program(buildbot, "sendchange", *change), check=True, stdout=subprocess.DEVNULL)
    database = sqlite3.connect("file:master/state.sqlite?mode=ro", uri=True, timeout=30)
    wait(lambda: state()[0] > 0, "the first line")
    began = time.monotonic()
    wait(lambda: state()[1], "the log's end")
    seconds = time.monotonic() - began
    # Beside the command's own lines there are some on it and its environment.
    print(json.dumps({"lines": state()[0], "seconds": seconds}))
finally:
    for process in reversed(daemons):
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
