# SPDX-License-Identifier: Apache-2.0
"""What is done with trained adapters: conversion and post-processing, swapping in place, serving many from disk."""
