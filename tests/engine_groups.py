"""Which tests of the Docker engine may run side by side: those of different groups share no name and no port."""

SECOND = {"test_backup", "test_bundle", "test_doctor", "test_figures", "test_image_lock", "test_security"}
SECOND |= {"test_setup", "test_status", "test_swarm", "test_toy_server", "test_two_hosts", "test_vllm"}
GROUPS = ("engine-1", "engine-2")


def group_of(module: str) -> str:
    """The group of a module in tests/compose, by its file's name without the suffix."""
    return GROUPS[module in SECOND]
