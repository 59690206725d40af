"""What methods are made of: attachments, freezing, layers and their changes, chosen entries, shadowed weights.

Each part knows how its tensors are saved, switched, folded, taken out and counted, so that a method borrows nothing.
What two methods share moves down here; a part knows no method. Parts stand on kernels and on data, on nothing above.
"""
