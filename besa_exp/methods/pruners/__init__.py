"""The pruners: one file a method, one YAML in conf/pruner, one row in tests/unit/test_pruners.py."""
