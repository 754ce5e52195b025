"""From options and masks to what is compiled: layers, layout, memory."""
