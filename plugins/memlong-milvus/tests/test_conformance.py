"""The bank meets the whole contract of memlong, embedded."""

from memlong.testing import MemoryBankTests
from memlong_milvus.bank import MilvusBank


class TestLite(MemoryBankTests):
    bank_class = MilvusBank
