"""The engine of production: SGLang, a server of its own that the worker starts and owns (docs/engine-sglang.md).

    child.py      the process: start, readiness, end
    http_api.py   what is said to it and what it says, over HTTP, by token ids
    sequences.py  which of our sequences it has, and what is to be reported of them
    pin_watch.py  KV that it holds and none of our sequences explains
    kv_events.py  its prefix cache in our block hashes
    engine.py     `Engine` made of these

Needs the extra baton-engine[sglang] here, and SGLang itself in whichever environment `sglang_command` names.
"""
