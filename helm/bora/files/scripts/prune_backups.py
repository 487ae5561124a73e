"""Removes etcd snapshots that are older than so many days, but never the newest one: prune_backups.py DIRECTORY DAYS."""

import pathlib
import sys
import time


def main():
    directory, days = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    snapshots = sorted(directory.glob("*.db"), key=lambda path: path.stat().st_mtime)
    oldest = time.time() - days * 86400
    for snapshot in snapshots[:-1]:
        if snapshot.stat().st_mtime < oldest:
            snapshot.unlink()
            print(f"{snapshot.name}: removed")
    print(f"newest: {snapshots[-1].name}, {snapshots[-1].stat().st_size} bytes" if snapshots else "no snapshot")


if __name__ == "__main__":
    main()
