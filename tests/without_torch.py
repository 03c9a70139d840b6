"""Commands of the program that need no torch: each in a fork of one process that has not imported it."""

import json
import subprocess
import sys

from conftest import REPOSITORY

SCRIPT = """
import json, os, sys, tempfile, traceback
import huggingface_hub
import dreambooth_implementation as db

def answer(flags):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            try:
                status = db.main(flags)
            except SystemExit as stop:  # after --help
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(99 if "torch" in sys.modules else status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return status, out.read(), err.read()
json.dump([answer(flags) for flags in json.load(sys.stdin)], sys.stdout)
"""


def answers(folder, commands):
    """[(exit status, standard output, standard error)] of each command in `folder`; the status is 99 if torch was imported."""
    script = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{SCRIPT}"
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, input=json.dumps(commands), capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
