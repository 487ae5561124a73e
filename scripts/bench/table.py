"""Prints JSON lines as a table: python3 table.py FILE"""

import json
import sys

rows = []
for line in open(sys.argv[1]):
    if line.startswith("{"):
        rows.append(json.loads(line))
for kind in dict.fromkeys(row.get("kind", "?") for row in rows):
    some = [row for row in rows if row.get("kind", "?") == kind]
    columns = [c for c in dict.fromkeys(key for row in some for key in row) if c != "kind"]
    cells = [columns] + [["" if row.get(c) is None else str(row[c]) for c in columns] for row in some]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{kind}")
    for line in cells:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths)))
