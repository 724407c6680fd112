"""Schedulers: one file each, behind the protocol of `launch.schedulers.protocol`."""
