"""``rbee-ctl``: the command line of rbee.

``commands`` parse, then run a playbook (``playbook``) or ask the queen (``queen_client``), and return an
``OperationResult``; ``render`` alone prints. Heavy modules are imported inside the commands that need them, so that
``rbee-ctl --help`` answers at once.
"""
