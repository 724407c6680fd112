"""Tests of Longview, mirrored by package."""
