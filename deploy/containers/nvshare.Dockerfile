# The agent, its tool, the device plugin and the library for users' containers.
# Context: the unpacked tarball of `cargo xtask dist`.
FROM debian:12-slim

COPY usr/bin/ /usr/bin/
COPY usr/lib/nvshare/ /usr/lib/nvshare/
COPY etc/nvshare/ /etc/nvshare/
COPY usr/share/doc/nvshare/ /usr/share/doc/nvshare/

# NVIDIA's runtime brings the driver's libraries and device files; nothing of CUDA is in the image.
ENV NVIDIA_VISIBLE_DEVICES=void \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ENTRYPOINT ["/usr/bin/nvshare-agent"]
CMD ["run", "--config", "/etc/nvshare/nvshare.toml"]
