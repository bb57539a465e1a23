"""Parts of ragkit in the form that other frameworks take; each module needs that framework's extra."""
