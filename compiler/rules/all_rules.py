"""Every rule module, imported: this fills the table."""

import shardc.compiler.rules.creation
import shardc.compiler.rules.index
import shardc.compiler.rules.matmul
import shardc.compiler.rules.pointwise
import shardc.compiler.rules.slice
import shardc.compiler.rules.view  # noqa: F401
