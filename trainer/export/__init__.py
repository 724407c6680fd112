"""A run's weights as files that other tools read and edit, and back: `python -m trainer export`, `import`.

    DIR/  export.json             what was exported: shapes, and the run's configuration
          dense.safetensors       the dense weights by name
          unknown.safetensors     row 0 of each table whose rows have keys: what ids without a key are given
          maps.safetensors        of tables of unbounded ids: TABLE/keys[i] is the key whose row is i + 1, and what
                                  decides who stays; taken back as it is
          tables/TABLE.parquet    a row a key: `key`, `values` and whether it is `trained`, for an id of a row that is
                                  not reads that of the unknown id; `row` for `key` where ids have no keys

Both go through a table in parts, so it may be larger than memory, and neither knows which ranks held what.

Optimizer state is not exported: it means nothing beside weights that were edited.  What is imported is a run at step 0
whose optimizers begin anew, but for a mark at the rows that are trained (`embeddings.rows.trained`).
"""
