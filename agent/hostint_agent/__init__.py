"""The agent on every node: loads and attaches the datapath, programs its tables, exports reports, tells its status."""
