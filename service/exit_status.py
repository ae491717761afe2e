"""The exit statuses of Vitrail's processes that have a meaning of their own."""

# The process cannot start with its settings. It is not restarted.
MISCONFIGURED = 2
# The process has lost its device (EX_IOERR of sysexits.h). A new process may get it back.
DEVICE_LOST = 74
