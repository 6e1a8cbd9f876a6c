"""What a checkpoint is made of, as data: names, manifest, index, boxes, checksums. No collectives, no ray."""
