"""A job of COUNT tasks that do nothing, on a HyperQueue server with a worker of SLOTS slots: how long, and at what cost."""

import glob
import json
import os
import resource
import sys
import time

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig

count, slots = int(sys.argv[1]), int(sys.argv[2])


def cpu():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


with LocalCluster(server_dir=os.path.abspath("server"), worker_config=WorkerConfig(cores=slots)) as cluster:
    client = cluster.client()
    job = Job()
    for _ in range(count):
        job.program(["/bin/true"])
    began, cpu_before = time.time(), cpu()
    # Raises if a task fails. It looks once a second, so the end is taken from what the tasks leave: each one's output, empty, is
    # made as it starts, and the last start is less than the last end by one /bin/true.
    client.wait_for_jobs([client.submit(job)])
    cpu_seconds = cpu() - cpu_before
outputs = glob.glob("*.stdout")
seconds = max(os.stat(output).st_ctime for output in outputs) - began
print(json.dumps({"finished": len(outputs), "seconds": seconds, "cpu_seconds": cpu_seconds}))
