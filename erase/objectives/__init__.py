"""Objectives that several methods share."""
