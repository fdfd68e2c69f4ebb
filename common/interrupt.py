"""Imported first by every script: Ctrl-C while torch is still being imported shows no traceback.

The system's own handler ends the process until `report_user_errors` puts Python's back.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
