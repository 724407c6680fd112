"""Checkpoints: everything that a run needs to resume, on this or another number of ranks, as if it had never stopped.

A checkpoint is a folder that needs nothing but JSON and plain bytes to be read, so reading one runs no code of its own:

    rank-00000.bin ...     the tensors' bytes, one file a rank that wrote
    manifest.json          what lies where, checksums, progress (step, samples, data position), versions
    COMPLETE               the manifest's SHA-256; written when everything else has reached the disk

A delta leaves out the rows of sharded tables that have not been looked up since its base, a full checkpoint, from which
they are read; it names it by step and by what its COMPLETE holds.

Names of tensors do not depend on the sharding plan:

    tables/...             embedding tables              (sharded: pieces of several files)
    tables_optimizer/...   their fused optimizer's state (likewise)
    ids/...                which key has which row       (of unbounded ids; sharded, whole in a delta too)
    dense/...              dense parameters              (replicated: stored once)
    dense_optimizer/...    Adam's state                  (likewise)

    save   live tensors -> regions -> staging (one copy in memory) -> writer (a process) -> chunks -> store; commit
           after deltas: touched rows -> staging -> folding into the copy of the last full one, in the writer -> ...
    load   catalogue (the newest that is whole) -> manifest -> loading (regions that overlap) -> live tensors
"""
