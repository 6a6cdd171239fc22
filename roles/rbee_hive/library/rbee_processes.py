#!/usr/bin/python
"""The worker processes of a node, as the kernel and systemd see them."""

from __future__ import annotations

from ansible.module_utils.rbee_node import NodeError, fail
from ansible.module_utils.rbee_processes import worker_process, worker_processes

DOCUMENTATION = r"""
module: rbee_processes
short_description: List the worker processes of a node
description:
  - A process is a worker's when it is in the cgroup of a unit C(rbee-worker@*.service), whatever it is called. The queen
    is not asked. Changes nothing; check mode is the same.
options:
  pid:
    description: This one process; fails with WORKER_NOT_FOUND when it is no worker's.
    type: int
  etc_dir:
    description: Where the instances' settings are.
    type: path
    default: /etc/rbee
author: rbee
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: List the worker processes
  rbee_processes:
"""

RETURN = r"""
rbee_result:
  description: C(processes), or with I(pid) C(process). C(role) is main for the unit's own, child for what is below it.
  returned: success
  type: dict
  sample:
    processes:
      - {pid: 312, role: main, worker_id: lab1-cpu0, name: cpu0, unit: rbee-worker@cpu0.service, model_id: smollm2-135m-instruct,
         uptime_s: 63.1, cpu_s: 4.2, rss_bytes: 178257920, command: "python -m rbee_serve.worker.main"}
"""


def report(params):
    """Return all worker processes, or the one that is asked for."""
    if params["pid"] is None:
        return {"processes": worker_processes(params["etc_dir"])}
    return {"process": worker_process(params["etc_dir"], params["pid"])}


def main():
    # Not at the top: rbee-ctl reads this machine with the functions above, in its own process (CAP-27).
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(
        argument_spec={"pid": {"type": "int"}, "etc_dir": {"type": "path", "default": "/etc/rbee"}}, supports_check_mode=True
    )
    try:
        result = report(module.params)
    except NodeError as e:
        fail(module, e)
    module.exit_json(changed=False, rbee_result=result)


if __name__ == "__main__":
    main()
