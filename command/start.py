"""What has to come before the imports, which take a second: the clock, and what Ctrl-C means."""
import signal
import time

BEGAN = time.perf_counter()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the weights are read Ctrl-C just ends the process. As an exception it would come out of
    # C code as some other error.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
