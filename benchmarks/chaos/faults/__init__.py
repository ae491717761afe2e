"""The faults, in the order in which they are injected."""

from functools import partial

from benchmarks.chaos.faults import clients, files, machine, passes, processes
from benchmarks.chaos.faults.fault import Fault

FAULTS = {
    "worker killed": Fault(partial(processes.killed, "worker")),
    "worker stopped": Fault(partial(processes.stopped, "worker")),
    "worker slows down": Fault(processes.worker_slows_down),
    "all workers killed": Fault(processes.workers_killed, refuses=True),
    "request kills worker": Fault(passes.worker_killed_by_request, refuses=True),
    "pass raises": Fault(partial(passes.poisoned, "raise", 500)),
    "outputs not finite": Fault(partial(passes.poisoned, "nan", 500)),
    "out of memory": Fault(passes.out_of_memory),
    "decoder killed": Fault(partial(processes.killed, "decoder")),
    "decoders stopped": Fault(processes.decoders_stopped),
    "gateway killed": Fault(partial(processes.killed, "gateway"), cuts=True),
    "gateway stopped": Fault(partial(processes.stopped, "gateway"), cuts=True),
    "supervisor stopped": Fault(processes.supervisor_stopped),
    "disk full": Fault(files.disk_full),
    "cache damaged": Fault(files.cache_damaged),
    "catalog damaged": Fault(files.catalog_damaged),
    "head damaged": Fault(files.head_damaged),
    "workers restarted": Fault(processes.workers_restarted),
    "models reloaded": Fault(clients.models_reloaded),
    "port taken": Fault(machine.port_taken),
    "clock jumps": Fault(machine.clock_jumps),
    "clients never read": Fault(clients.clients_never_read),
    "supervisor killed": Fault(
        processes.supervisor_killed, cuts=True, refuses=True, stops_all=True
    ),
}
