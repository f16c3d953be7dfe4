"""Figures of a host with something of every kind, for tests and for the catalogue."""

from __future__ import annotations

from corral.verbs.status.figures import Figures

BOX, HAPROXY = ("chat-1", "box-chat-1"), ("haproxy", "box-haproxy")
EXAMPLE: Figures = {
    "corral_figures_timestamp_seconds": {(): 1_800_000_000.0},
    "corral_figures_scheduled": {(): True},
    "corral_rendering": {(): {"hash": "0123456789abcdef", "inventory": "fedcba9876543210", "version": "0.1.0"}},
    "corral_drift": {("rendering",): False, ("containers",): True, ("copy",): False},
    "corral_container_healthy": {BOX: True, HAPROXY: False},
    "corral_container_restarts": {BOX: 2},
    "corral_container_memory_bytes": {BOX: 100 * 2**20},
    "corral_container_memory_limit_bytes": {BOX: 512 * 2**20},
    "corral_weights_verified": {("qwen3", "qwen3.gguf"): True, ("nomic", "nomic.gguf"): False},
    "corral_weights_checked_timestamp_seconds": {("qwen3", "qwen3.gguf"): 1_799_990_000.0},
    "corral_certificate_expires_timestamp_seconds": {("/etc/ssl/farm.pem",): 1_811_808_000, ("/etc/ssl/page.pem",): 0},
    "corral_backup_last_success_timestamp_seconds": {(): 1_799_900_000.0},
}
