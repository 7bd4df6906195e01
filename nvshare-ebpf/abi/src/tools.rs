//! The ioctls of `/dev/nvidia-uvm-tools`, by driver version.
