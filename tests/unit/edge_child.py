"""A worker process for test_edge.py: greet, echo each message, wait forever on `hang`, exit on `exit`."""

import os
import time

os.write(0, b"ready")
while message := os.read(0, 1 << 17):
    if message == b"hang":
        time.sleep(1000)
    if message == b"exit":
        os._exit(3)
    os.write(0, b"<" + message + b">")
