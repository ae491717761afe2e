# What installed packages have for their own tests, and for compiling against them.
find /opt/vitrail/lib -type d -name tests -prune -exec rm -rf {} +
find /opt/vitrail/lib -name '*.a' -delete
rm -rf /opt/vitrail/lib/python*/site-packages/pyarrow/include
