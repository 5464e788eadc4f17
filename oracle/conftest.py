"""The whole suite on two cores, for who runs it, not for who reads it: several files of tests are
shared with a forked process, and whoever is done with a file takes the next. All else is as pytest
has it; what the other process found is shown at the end.
"""
import itertools
import os
import pickle
import sys
import tempfile

import pytest

DONE = 42                                              # a process that a test ended says another


def pytest_runtestloop(session):
    """pytest's own loop (None) where there is nothing to share or tests are to run one by one."""
    files = [list(items) for _, items in itertools.groupby(session.items, lambda i: i.path)]
    o, hook = session.config.option, session.config.hook
    if (len(files) < 4 or session.testsfailed or o.maxfail or o.usepdb or o.collectonly
            or o.capture == "no" or cores() < 2):
        return None
    queue, end = os.pipe()                             # a byte per file
    os.write(end, bytes(range(len(files))))
    os.close(end)

    def work():
        while turn := os.read(queue, 1):
            items = files[turn[0]]
            for item, following in itertools.zip_longest(items, items[1:]):
                hook.pytest_runtest_protocol(item=item, nextitem=following)

    with tempfile.TemporaryFile() as reports:
        if not (other := os.fork()):
            try:
                second(session.config, reports)
                work()
                reports.flush()
                os._exit(DONE)
            finally:
                os._exit(1)
        work()
        if os.waitpid(other, 0)[1] != DONE << 8:
            pytest.exit("the second process of the tests has ended early", 3)
        reports.seek(0)
        while reports.peek(1):
            report = hook.pytest_report_from_serializable(config=session.config,
                                                          data=pickle.load(reports))
            hook.pytest_runtest_logreport(report=report)
    return True


def cores():
    """That this process may use; 1 where a process with PyTorch in it had better not be forked."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def second(config, reports):
    """Make this process one that is silent and writes what it finds into `reports`."""
    class Written:
        def pytest_runtest_logreport(self, report):
            pickle.dump(config.hook.pytest_report_to_serializable(config=config, report=report),
                        reports)
    plugins = config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Written())
    capture = plugins.getplugin("capturemanager")      # the files behind it are the first one's
    capture.stop_global_capturing()
    capture.start_global_capturing()
